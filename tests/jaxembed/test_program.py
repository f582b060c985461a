"""What XLA is told; what the programs compute is compared where they run (test_engine, models/)."""

from jaxembed.attention import FUSED_LENGTH
from jaxembed.program import compiler_options
from jaxembed.types import Bucket


def test_what_xla_is_told_on_a_gpu() -> None:
    """No trying out of Triton's kernels, which takes long, where they are no faster; nothing on other platforms."""
    flag = "xla_gpu_enable_triton_gemm"
    few, many = Bucket(4, FUSED_LENGTH - 1), Bucket(4, FUSED_LENGTH)
    assert compiler_options("bfloat16", "gpu", few) == {flag: True}
    assert compiler_options("bfloat16", "gpu", many) == {flag: False}
    assert compiler_options("float32", "gpu", few) == compiler_options("float32", "gpu", many) == {flag: False}
    assert compiler_options("bfloat16", "cpu", few) is compiler_options("bfloat16", "tpu", many) is None
