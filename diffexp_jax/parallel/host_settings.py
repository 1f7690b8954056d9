"""What the user says of the hosts of a run."""

from dataclasses import dataclass

from diffexp_jax.limits import setting, whole


@dataclass(frozen=True)
class HostSettings:
    """One run over several processes, one a machine or one a GPU.

    TPU pods, SLURM and Open MPI need none of it (docs/use/launch.md).
    """

    coordinator: str | None = setting(
        None, "HOST:PORT of the first process; None: JAX_COORDINATOR_ADDRESS, or as found"
    )
    number: int | None = setting(
        None,
        "number of processes; None: JAX_NUM_PROCESSES, or as found; 1: one host in any environment",
        whole(1, 2**16, optional=True),
    )
    index: int | None = setting(
        None,
        "index of this process, from 0; None: JAX_PROCESS_ID, or as found",
        whole(0, 2**16, optional=True),
    )
    initialization_timeout: int = setting(300, "seconds within which all processes have to be there", whole(1, 86400))
    heartbeat_timeout: int = setting(
        100,
        "seconds of silence after which a process counts as gone and the others end",
        whole(1, 86400),
    )

    @property
    def place(self) -> tuple[str | None, int | None, int | None]:
        """(coordinator, number, index): who is who."""
        return self.coordinator, self.number, self.index
