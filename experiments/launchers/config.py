"""What a recipe says of the machines that its runs are trained on."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from alignlab.config.data import Settings
from alignlab.config.limits import at_most
from alignlab.config.run import RunConfig, check_coupled
from alignlab.errors import UserError

ONE_MACHINE = "a run is on one machine"
Gpus = Annotated[float, Field(ge=0), at_most(1024, ONE_MACHINE)]
NumRanks = Annotated[int, Field(ge=1), at_most(1024, ONE_MACHINE)]


class SlurmConfig(Settings):
    """What the jobs of `--launcher slurm` ask for besides; nothing else reads it."""

    partition: str | None = None
    """Left out: the cluster's default, as for all names here."""
    account: str | None = None
    """Who pays for the jobs."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features of nodes, such as `h100`."""
    hours: Annotated[float, Field(ge=0.25), at_most(8760, "no job runs for years")] = 24.0
    """Time limit of a job, at least a quarter: five minutes before its end the run writes a
    checkpoint, and is requeued and resumed."""
    options: dict[str, str | int | bool] = Field(default_factory=dict)
    """Other options of sbatch by their long names, such as `{exclude: node7}`."""


class LaunchConfig(Settings):
    """What each run of a comparison or a sweep needs of its machine.

    Ray and SLURM reserve it. The local launcher refuses a machine that has less for the runs that
    it trains at a time: one, or as many as a sweep has workers.
    """

    cpus: int | None = Field(default=None, ge=1)
    """CPU cores, and threads that torch computes with. Left out: one with Ray; all locally; of a
    run with several ranks, one for each."""
    gpus: Gpus | None = None
    """Of a GPU: a half lets two runs share one. A whole number above 1: GPUs of one machine that
    train each run together, a rank on each. Left out: one where there are any."""
    ranks: NumRanks | None = None
    """Processes that train each run together. Left out: one for each of
    `gpus`. Only on the CPU it has to be written: `{gpus: 0, ranks: 2}`."""
    memory_gib: float | None = Field(default=None, gt=0)
    """Main memory. Left out: it is not looked at."""
    slurm: SlurmConfig = SlurmConfig()
    """Of jobs that SLURM runs."""

    @property
    def num_ranks(self) -> int:
        """Processes of each run."""
        return self.ranks or max(1, int(self.gpus or 1))

    @model_validator(mode="after")
    def _one_gpu_for_each_rank(self) -> Self:
        gpus, ranks = self.gpus, self.ranks
        if gpus is not None and gpus > 1 and gpus != int(gpus):
            raise ValueError(f"gpus: {gpus:g} must be a whole number, or at most 1: a run's ranks")
        if gpus is not None and 0 < gpus < 1 and self.slurm != SlurmConfig():
            raise ValueError(f"gpus: {gpus:g}, but SLURM gives a job whole GPUs: see launch.slurm")
        if gpus and ranks is not None and gpus != ranks and (gpus > 1 or ranks > 1):
            raise ValueError(f"ranks: {ranks}, but gpus: {gpus:g}: each rank has a GPU of its own")
        return self


def check_batch(run: RunConfig, needs: LaunchConfig) -> None:
    """Refuses a batch that the ranks of a run cannot share, before anything is made.

    Raises:
        UserError: `optim.batch_size` is no multiple of `optim.accumulate` times ranks, or an
            objective compares the samples of a batch.
    """
    check_coupled(run.objectives, needs.num_ranks)
    batch_size, accumulate = run.optim.batch_size, run.optim.accumulate
    if batch_size % (accumulate * needs.num_ranks):
        raise UserError(
            f"launch: {needs.num_ranks} ranks, but optim.batch_size {batch_size} is no multiple of "
            f"optim.accumulate times ranks, {accumulate} x {needs.num_ranks}"
        )
