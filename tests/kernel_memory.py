"""A pytest plugin: a notebook that nbval runs fails as soon as its kernel has had more memory than a notebook may.

Classrooms and Binder have 2 GB for everything.
"""

import psutil
import pytest

from vitlib.course.kernels import peak_memory

LIMIT = 2**30  # bytes


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    result = yield
    if hasattr(item, "cell_num"):  # a notebook's cell
        try:
            peak = peak_memory(item.parent.kernel.km.provisioner.pid)
        except psutil.Error:  # the cell has ended its kernel
            return result
        if peak > LIMIT:
            pytest.fail(
                f"the kernel has had {peak / 2**20:,.0f} MiB in memory, of which {LIMIT / 2**20:,.0f} are allowed"
            )
    return result
