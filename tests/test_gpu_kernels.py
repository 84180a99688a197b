"""Every GPU function on a real GPU, against the definition."""

from __future__ import annotations

import pytest

from tests import gpu_kernels_check
from tests.conftest import skip_unless_usable


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", gpu_kernels_check.ROUNDOFF)
@pytest.mark.parametrize("problem", gpu_kernels_check.PROBLEMS, ids=str)
def test_functions_agree_with_the_definition(problem, dtype):
    skip_unless_usable("cuda")
    assert gpu_kernels_check.check(gpu_kernels_check.gpu_runner, (dtype,), [problem])
