# What differs from site to site, and nothing else: sourced by train_1b.sh in the folder of the clone, on every start of the job.
# The partition, the account and the like are better given to sbatch or set as SBATCH_PARTITION, SBATCH_ACCOUNT in your shell.

# module load cuda/13.0 python/3.12

PYTHON=.venv/bin/python            # what `make` sets up; a path that every node sees
MPIRUN=.venv/bin/mpirun            # mpich's, which make installs; for LAUNCH=mpirun on a fast network name the cluster's own (docs/preflight.md)

# The network between the nodes. NCCL and gloo guess, and guess wrong where a node has several.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5

# The tasks' command in a container that holds Python and the packages (pyxis; the clone is mounted where it lies):
# CONTAINER=(--container-image=/images/pytorch.sqsh --container-mounts="$PWD:$PWD" --container-workdir="$PWD")
