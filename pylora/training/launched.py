"""How many processes a launcher started together, as the environment says; nothing is imported."""

from __future__ import annotations

import os


def launched() -> int:
    """The number that `mpiexec` (MPICH and its kin, Open MPI) or `srun` started with this process;
    1 without one."""
    names = ["PMI_SIZE", "OMPI_COMM_WORLD_SIZE"]
    if "PMIX_RANK" in os.environ:  # else it is the job's, of a script that nobody launched
        names.append("SLURM_STEP_NUM_TASKS")
    found = [int(text) for name in names if (text := os.environ.get(name, "")).isdigit()]
    return max([1, *found])
