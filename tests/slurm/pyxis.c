/* A stand-in for NVIDIA's pyxis plugin: srun accepts the container options, the task runs on the host and finds them
 * in TEST_CONTAINER_IMAGE, TEST_CONTAINER_MOUNTS and TEST_CONTAINER_NAME. */
#include <slurm/spank.h>
#include <stddef.h>

SPANK_PLUGIN(pyxis, 1)

static int accept(int val, const char *optarg, int remote) {
    (void)val, (void)optarg, (void)remote;
    return 0;
}

static struct spank_option options[] = {
    {"container-image", "IMAGE", "container image", 1, 1, accept},
    {"container-mounts", "SRC:DST[,...]", "bind mounts", 1, 2, accept},
    {"container-workdir", "PATH", "working folder", 1, 3, accept},
    {"no-container-mount-home", NULL, "leave the home folder out", 0, 4, accept},
    {"container-writable", NULL, "let the task write into its copy of the image", 0, 5, accept},
    {"container-name", "NAME", "keep and reuse the unpacked image", 1, 6, accept},
};

int slurm_spank_init(spank_t sp, int argc, char **argv) {
    (void)argc, (void)argv;
    if (spank_context() == S_CTX_SLURMD)
        return 0;
    for (size_t i = 0; i < sizeof options / sizeof *options; i++)
        if (spank_option_register(sp, &options[i]) != ESPANK_SUCCESS)
            return -1;
    return 0;
}

int slurm_spank_task_init(spank_t sp, int argc, char **argv) {
    char *value = NULL, rank[16] = "";
    (void)argc, (void)argv;
    if (spank_option_getopt(sp, &options[0], &value) == ESPANK_SUCCESS && value)
        spank_setenv(sp, "TEST_CONTAINER_IMAGE", value, 1);
    /* As pyxis does in an image of PyTorch's: these two of torchrun's variables and no more. */
    if (value && spank_getenv(sp, "SLURM_PROCID", rank, sizeof rank) == ESPANK_SUCCESS)
        spank_setenv(sp, "RANK", rank, 1);
    if (value && spank_getenv(sp, "SLURM_LOCALID", rank, sizeof rank) == ESPANK_SUCCESS)
        spank_setenv(sp, "LOCAL_RANK", rank, 1);
    if (spank_option_getopt(sp, &options[1], &value) == ESPANK_SUCCESS && value)
        spank_setenv(sp, "TEST_CONTAINER_MOUNTS", value, 1);
    if (spank_option_getopt(sp, &options[5], &value) == ESPANK_SUCCESS && value)
        spank_setenv(sp, "TEST_CONTAINER_NAME", value, 1);
    return 0;
}
