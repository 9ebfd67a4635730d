"""`nemo-tsdkd plan`: what a job will hold, send and take, before it costs a GPU hour."""
