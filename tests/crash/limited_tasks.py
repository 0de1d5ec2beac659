"""Tasks with limits of their own, which a consumer without a supervisor speaks of."""

from firefly_jobs import atask, task


@task(time_limit=60)
def limited_in_time() -> None:
    """Do nothing."""


@atask(memory_limit="64GB")
async def limited_in_memory() -> None:
    """Do nothing."""
