"""The `nemo-tsdkd` command: one module a sub-command."""
