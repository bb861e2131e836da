#!/bin/bash
#SBATCH --job-name=long-sequences
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8

# One task for each GPU. Every task finds its rank and the first host in what srun sets: no further launcher is needed.
# All 16 share each sequence; what follows `sbatch examples/xtuner/slurm.sh` goes to the script.
srun python examples/xtuner/train.py --launcher slurm --sequence-parallel-size "${SLURM_NTASKS:-16}" "$@"
