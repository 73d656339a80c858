"""A pytest plugin: a notebook that nbval runs fails as soon as its kernel has had more memory than a notebook may.

Classrooms and Binder have 2 GB for everything. The notebooks' own parameters are those of ``class.yaml``.
"""

import psutil
import pytest

from vitlib.course.kernels import peak_memory

LIMIT = 2**30  # bytes
peaks: dict[str, int] = {}  # by notebook


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    result = yield
    if hasattr(item, "cell_num"):  # a notebook's cell
        try:
            peak = peak_memory(item.parent.kernel.km.provisioner.pid)
        except psutil.Error:  # the cell has ended its kernel
            return result
        item.user_properties.append(("peak", (item.parent.nodeid, peak)))  # travels from a worker to the report
        if peak > LIMIT:
            pytest.fail(
                f"the kernel has had {peak / 2**20:,.0f} MiB in memory, of which {LIMIT / 2**20:,.0f} are allowed"
            )
    return result


def pytest_runtest_logreport(report):
    peaks.update(value for name, value in report.user_properties if name == "peak")


def pytest_terminal_summary(terminalreporter):
    if peaks:
        terminalreporter.section("most memory of each notebook's kernel")
        for name, peak in peaks.items():
            terminalreporter.write_line(f"{peak / 2**20:6,.0f} MiB  {name}")
