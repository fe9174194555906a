"""Running tests on several ranks: ``mpirun -n N python -m mpi4py -m pytest --with-mpi tests/mpi``.

Every rank runs the same tests in the same order. After each test the ranks tell each other how it
went, so that rank 0 reports a failure of any rank. If a rank fails while the others wait for it
inside the test, that exchange cannot complete; the failing rank then prints its report and aborts
the job, because nothing else ends the wait of the others. A test that hangs ends likewise: the
timeout's thread leaves the process, and the launcher ends the other ranks.
"""

import io
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
from _pytest.runner import runtestprotocol

if TYPE_CHECKING:
    from mpi4py import MPI

#: How long a rank that failed waits for the others to finish the test before it aborts the job.
GRACE_SECONDS = 10.0
_PLUGIN = "epcomm-rank-reports"


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--with-mpi") or config.getoption("--only-mpi"):
        config.option.timeout_method = "thread"  # a signal would not interrupt an MPI call
        config.pluginmanager.register(RankReports(), _PLUGIN)
        # The ranks must draw the same examples, and take as long as the slowest of them.
        hypothesis.settings.register_profile(
            "mpi", derandomize=True, database=None, deadline=None, print_blob=False
        )
        hypothesis.settings.load_profile("mpi")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if config.rootpath / "tests/mpi" in item.path.parents:
            item.add_marker("mpi")


class RankReports:
    """Makes one report out of the ranks' reports of each test.

    Attributes:
        communicators: what the current test's fixtures made, freed after the test.

    """

    def __init__(self) -> None:
        from mpi4py import MPI

        # Apart from the tests' own traffic.
        self.comm = MPI.COMM_WORLD.Dup()
        self.communicators: list[MPI.Intracomm] = []
        self.passed = 0

    @pytest.hookimpl(trylast=True)
    def pytest_sessionstart(self, session: pytest.Session) -> None:
        if self.comm.rank > 0:
            reporter: Any = session.config.pluginmanager.get_plugin("terminalreporter")
            reporter._tw._file = io.StringIO()

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        # Rank 0 reports the failed tests, and must not be aborted by another rank before it has.
        if self.comm.rank > 0 and session.exitstatus == pytest.ExitCode.TESTS_FAILED:
            session.exitstatus = pytest.ExitCode.OK

    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool:
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        reports = runtestprotocol(item, log=False, nextitem=nextitem)
        self._agree(item.nodeid, reports)
        for report in reports:
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def _agree(self, nodeid: str, reports: list[pytest.TestReport]) -> None:
        """Make a failure on any rank a failure on all ranks."""
        failure = "\n".join(report.longreprtext for report in reports if report.failed)
        self._await_others(nodeid, failure)
        failures = self.comm.allgather(failure)
        if not any(failures):
            for communicator in self.communicators:
                communicator.Free()
            # Rank 0 takes part in every test, so its skips are those that count.
            self.passed += self.comm.bcast(all(report.passed for report in reports))
        else:
            # After a failure the test's traffic may be unmatched, and freeing could wait for ever.
            call = next((report for report in reports if report.when == "call"), reports[0])
            call.outcome = "failed"
            call.longrepr = "\n".join(
                f"----- rank {rank} of {self.comm.size} -----\n{text}"
                for rank, text in enumerate(failures)
                if text
            )
        self.communicators.clear()

    def _await_others(self, nodeid: str, failure: str) -> None:
        request = self.comm.Ibarrier()
        deadline = time.monotonic() + GRACE_SECONDS
        while not request.Test():
            if failure and time.monotonic() > deadline:
                report = (
                    f"\n----- rank {self.comm.rank} of {self.comm.size} failed in {nodeid}; other"
                    f" ranks still wait inside the test, so the run ends here -----\n{failure}\n"
                    f"=== {self.passed} passed, 1 failed before the run was aborted ===\n"
                )
                os.write(2, report.encode())
                self.comm.Abort(1)
            time.sleep(0.001)


@pytest.fixture
def comm(request: pytest.FixtureRequest) -> "MPI.Intracomm":
    """Duplicate the communicator of all launched ranks, for one test."""
    from mpi4py import MPI

    # Without --with-mpi there is no such plugin, and a test under tests/mpi is skipped before.
    reports: Any = request.config.pluginmanager.get_plugin(_PLUGIN)
    reports.communicators.append(MPI.COMM_WORLD.Dup())
    return reports.communicators[-1]


@pytest.fixture
def world(
    comm: "MPI.Intracomm", request: pytest.FixtureRequest
) -> "Callable[[int], MPI.Intracomm]":
    """``world(size)`` returns a communicator of the first ``size`` ranks.

    On the other ranks the test ends there, as skipped; rank 0 always takes part. Where fewer ranks
    were launched the test is skipped everywhere.
    """
    reports: Any = request.config.pluginmanager.get_plugin(_PLUGIN)

    def first_ranks(size: int) -> "MPI.Intracomm":
        from mpi4py import MPI

        if size > comm.size:
            pytest.skip(f"needs {size} ranks, and {comm.size} were launched")
        part = comm.Split(0 if comm.rank < size else MPI.UNDEFINED, comm.rank)
        if part == MPI.COMM_NULL:
            pytest.skip(f"rank {comm.rank} is not one of the first {size}")
        reports.communicators.append(part)
        return part

    return first_ranks
