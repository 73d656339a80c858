"""The engine of a sweep: jobs on Dask workers, on this machine or on a cluster, with retries and a live display."""

import contextlib
import heapq
import logging
import queue
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from importlib.metadata import version

import dask
from dask.system import CPU_COUNT
from distributed import Client, Future, KilledWorker, LocalCluster
from distributed.system import MEMORY_LIMIT

from vitlib.course.early import start_method
from vitlib.course.runner import RunResult
from vitlib.course.worker import Job, Result, facts, run_job
from vitlib.utils import progress_bar

RUN_MEMORY = 2**30  # bytes that one run may take; the course's kernels stay below with the class parameters
PATIENCE = 10  # seconds for a scheduler to answer, and for its first worker to be there
UNCOUNTED = 3  # times that a run is sent again after its worker died before the run had begun
GONE_SENTENCE = "The scheduler is gone; the same command again goes on with what is missing."
GONE = ("lost", "cancelled")  # what Dask calls runs that nobody but their scheduler has dropped

LOCAL_SETTINGS = {
    "distributed.scheduler.allowed-failures": 0,  # retries are counted here, not by the scheduler
    "distributed.comm.timeouts.connect": f"{PATIENCE}s",
    # 100 looks a second at what the worker does, and 50 at its event loop, cost a tenth of a core for two workers
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "1s",
}


def local_size(runs: int, workers: int | None = None, threads: int | None = None) -> tuple[int, int]:
    """How many workers this machine should have for so many runs, and how many threads each run.

    Small models gain little from a second thread, and processes that compute on more threads than there are cores wait
    for each other: so as many runs at once as there are cores, and memory of ``RUN_MEMORY`` for each; threads for what
    cores are left. Cores and memory are those that a container allows.
    """
    if workers is None:
        cores = CPU_COUNT // threads if threads else CPU_COUNT
        workers = max(1, min(cores, int(MEMORY_LIMIT // RUN_MEMORY), runs))
    return workers, threads or max(1, CPU_COUNT // workers)


@contextlib.contextmanager
def local_workers(count: int) -> Iterator[Client]:
    """A scheduler and ``count`` worker processes on this machine, reachable from nowhere else; they end with it."""
    with (
        dask.config.set({**LOCAL_SETTINGS, "distributed.worker.multiprocessing-method": start_method()}),
        LocalCluster(
            n_workers=count,
            threads_per_worker=1,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",  # any free port: 8787 may be that of another sweep
            memory_limit=None,  # it would count the worker, not the kernel that the worker starts
            preload=["vitlib.course.worker"],
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


class _ClosedOnFailure(Client):
    """A client that closes when it cannot start. Dask's is else closed by the garbage collector, which may run in the
    thread of the next client or cluster and wait there for a lock that is held until this very thread has started.
    """

    def start(self, **kwargs) -> None:
        try:
            super().start(**kwargs)
        except BaseException:
            self.close()
            raise


@contextlib.contextmanager
def cluster_workers(address: str) -> Iterator[Client]:
    """The workers of the scheduler at ``address``.

    Raises:
        ValueError: if the address is not one.
        ConnectionError: if no scheduler answers there, it has no worker, or a worker lacks this version of vitlib.
    """
    for name in ("distributed", "distributed.client"):  # what they would say is said here, in one line
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    try:
        client = _ClosedOnFailure(address, timeout=PATIENCE, set_as_default=False)
    except (ValueError, TypeError) as error:
        raise ValueError(f"scheduler={address!r} is not an address; give one such as tcp://192.0.2.1:8786.") from error
    except OSError as error:
        raise ConnectionError(
            f"No scheduler answers at {address} within {PATIENCE} s; start one with `dask scheduler`, or leave "
            "--scheduler out to use this machine."
        ) from error
    with client:
        _check_workers(client, address)
        yield client


def _check_workers(client: Client, address: str) -> None:
    try:
        client.wait_for_workers(1, timeout=PATIENCE)
    except TimeoutError as error:
        raise ConnectionError(
            f"The scheduler at {address} has no worker; start some with `dask worker {address} --nthreads 1`."
        ) from error
    own = version("vitlib")
    for worker, answer in client.run(facts, on_error="return").items():
        if isinstance(answer, Exception):
            problem = f"cannot run it ({type(answer).__name__}: {answer})"
        elif answer["vitlib"] != own:
            problem = f"has vitlib {answer['vitlib']}"
        else:
            continue
        raise ConnectionError(f"The worker {worker} {problem}; install vitlib {own} with its extra `sweep` there.")


class Sender:
    """Sends jobs to workers and gives back what comes of each.

    No more are sent than the workers have threads, so that whichever is free first gets the next one. Dask would give
    each worker its share at once, and some would wait behind a long run while another worker has nothing to do.

    Args:
        client: of the scheduler.
        retries: how often a run that failed is tried again.
    """

    def __init__(self, client: Client, retries: int):
        self.starts: Counter[str] = Counter()  # by key, how often a run has begun
        self.hosts: dict[str, str] = {}  # by key, where it began last
        self._client = client
        self._retries = retries
        self._topic = f"vitlib-sweep-{uuid.uuid4().hex}"
        self._failures: Counter[str] = Counter()
        self._seen: Counter[str] = Counter()  # starts that have been followed by an end
        self._sent: Counter[str] = Counter()
        self._order: dict[str, int] = {}
        self._waiting: list[tuple[int, Job]] = []  # a heap: the earlier in the plan, the sooner
        self._open: dict[Future, Job] = {}
        self._events: queue.SimpleQueue = queue.SimpleQueue()
        client.subscribe_topic(self._topic, self._note_start)

    @property
    def running(self) -> int:
        return sum(self.starts[job.key] > self._seen[job.key] for job in self._open.values())

    def add(self, job: Job) -> None:
        """A job to run; what is to be tried again comes before what is new."""
        heapq.heappush(self._waiting, (self._order.setdefault(job.key, len(self._order)), job))

    def _fill(self) -> None:
        """Send what the workers have room for; were there none, one job waits for the first that comes back."""
        if not self._waiting:
            return
        try:
            threads = sum(self._client.nthreads().values())
        except OSError as error:
            raise ConnectionError(GONE_SENTENCE) from error
        room = max(1, threads) - len(self._open)
        for _ in range(min(room, len(self._waiting))):
            self._send(heapq.heappop(self._waiting)[1])

    def _send(self, job: Job) -> None:
        self._sent[job.key] += 1
        key = f"{job.key}-{self._sent[job.key]}-{self._topic[-8:]}"
        future = self._client.submit(run_job, replace(job, topic=self._topic), key=key, pure=False)
        self._open[future] = job
        future.add_done_callback(self._events.put)

    def results(self, every: Callable[[], None]) -> Iterator[tuple[Job, Result]]:
        """Each job with its last result, as they come; ``every`` is called about once a second.

        Raises:
            ConnectionError: if the scheduler is gone.
        """
        while self._open or self._waiting:
            self._check_connection()
            self._fill()
            future = self._next_event()
            if future in self._open:
                ended = self._ended(future)
                self._fill()  # before the result is stored
                if ended:
                    yield ended
            every()

    def _next_event(self) -> Future | None:
        """The next future that has ended; None if none does within a second."""
        try:
            return self._events.get(timeout=1)
        except queue.Empty:
            return None

    def give_up(self) -> None:
        """Tell the workers that nobody waits any longer: they end what they run."""
        with contextlib.suppress(Exception):  # the connection may be what is broken
            self._client.cancel(list(self._open), force=True)

    def _note_start(self, event: tuple[float, dict]) -> None:
        _, message = event
        self.hosts[message["key"]] = message["host"]
        self.starts[message["key"]] += 1

    def _check_connection(self) -> None:
        if self._client.status != "running" or any(future.status in GONE for future in self._open):
            raise ConnectionError(GONE_SENTENCE)

    def _ended(self, future: Future) -> tuple[Job, Result] | None:
        """The job of a future and its result; None if it is tried again."""
        self._check_connection()
        job = self._open.pop(future)
        has_begun = self.starts[job.key] > self._seen[job.key]
        result = _result_of(future, self.hosts.get(job.key, ""))
        is_innocent = future.status == "error" and not has_begun and self._sent[job.key] <= UNCOUNTED
        self._seen[job.key] = self.starts[job.key]
        future.release()
        if result.outcome.status == "failed" and not is_innocent:
            self._failures[job.key] += 1
        if result.outcome.status == "failed" and self._failures[job.key] <= self._retries:
            self.add(job)
            return None
        return job, result


def _result_of(future: Future, host: str) -> Result:
    try:
        return future.result()
    except KilledWorker:
        error = "its worker died (killed, or no memory left)"
    except Exception as failure:  # of the worker, not of the notebook: a full disk, another version of a package
        error = f"its worker failed with {type(failure).__name__}: {failure}"
    return Result(RunResult("failed", error), host)


class Display:
    """One line for a sweep under way: how many are done, running and failed, and when it will end."""

    def __init__(self, total: int, show: bool = True):
        self._bar = progress_bar(description="sweep", total=total, unit="run", show=show)
        self._start = time.monotonic()
        self._failed = 0
        self._is_live = sys.stdout.isatty()
        self._last = ""

    def ended(self, line: str, failed: bool) -> None:
        self._failed += failed
        self._bar.write(line, file=sys.stdout)
        self._bar.update()

    def show(self, running: int) -> None:
        """Called once a second; where the line cannot be overwritten, only what has changed is printed."""
        text = ", ".join(filter(None, (f"{running} running", self._failed and f"{self._failed} failed", self._end())))
        if self._is_live or text != self._last:
            self._bar.set_postfix_str(text, refresh=self._is_live)
        self._last = text

    def _end(self) -> str:
        done, total = self._bar.n, self._bar.total
        if not 0 < done < total:
            return ""
        left = (time.monotonic() - self._start) / done * (total - done)
        return f"ends about {datetime.now() + timedelta(seconds=left):%H:%M}"

    def close(self) -> None:
        self._bar.close()


def run_jobs(
    client: Client, jobs: Sequence[Job], retries: int, done: Callable[[Job, Result, int], str], show: bool = True
) -> None:
    """Run all jobs. ``done`` gets each with its last result and the number of times it was begun, and returns the line
    to print. However this ends, no worker goes on with what it was sent.
    """
    sender, display = Sender(client, retries), Display(len(jobs), show)
    try:
        for job in jobs:
            sender.add(job)
        for job, result in sender.results(lambda: display.show(sender.running)):
            line = done(job, result, sender.starts[job.key])
            display.ended(line, result.outcome.status != "ok")
    finally:
        sender.give_up()
        display.close()
