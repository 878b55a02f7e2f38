"""Finding, loading and controlling the native library."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from host_ops import native
from tests.host_ops import cases

INFO = "from host_ops import native; about = native.info(); print(about['loaded'], about['reason'])"


def info_in_a_new_process(**environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", INFO],
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.mark.native
def test_info_describes_the_library():
    about = native.info()
    assert about["loaded"]
    assert about["reason"] is None
    assert about["path"].endswith(".so")
    assert about["variant"] in about["variants"]
    assert about["variants"][-1] == "scalar"
    assert 1 <= about["threads"] <= native.MAX_THREADS
    assert about["cpus"] == len(os.sched_getaffinity(0))


def test_a_missing_library_is_explained(tmp_path):
    missing = str(tmp_path / "none.so")
    said = info_in_a_new_process(FLUXION_HOST_LIBRARY=missing)
    assert said.startswith(f"False expected the native library at {missing}, got no such file")
    assert "host_ops/csrc/README.md" in said


def test_a_file_that_is_no_library_is_explained(tmp_path):
    wrong = tmp_path / "wrong.so"
    wrong.write_text("not a library")
    said = info_in_a_new_process(FLUXION_HOST_LIBRARY=str(wrong))
    assert said.startswith("False expected a library that loads, got ")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("FLUXION_NUM_THREADS", "0", "expected FLUXION_NUM_THREADS to be a number from 1 to 1024"),
        ("FLUXION_NUM_THREADS", "many", "got 'many'"),
        ("FLUXION_SPIN_US", "-1", "expected FLUXION_SPIN_US to be a number from 0 to 1000000"),
        ("FLUXION_CPUS", "0;1", "expected FLUXION_CPUS to be a list of CPUs such as '0-3,8'"),
        ("FLUXION_CPUS", "1-0", "to ascend, got '1-0'; write '0-1'"),
        ("FLUXION_CPUS", "0,60000", "leave out [60000]"),
        ("FLUXION_TIMEOUT_S", "soon", "got 'soon'; unset it for the default of 300"),
        ("FLUXION_CUDA_SYNC", "fast", "to be 'memops', 'kernel' or 'hostfunc', got 'fast'"),
        ("FLUXION_TIMEOUT_S", "-1", "expected FLUXION_TIMEOUT_S to be a positive number"),
    ],
)
def test_a_wrong_environment_is_explained(name, value, said):
    output = info_in_a_new_process(**{name: value})
    assert output.startswith("False")
    assert said in output


@pytest.mark.native
def test_an_unknown_cpu_variant_is_explained():
    said = info_in_a_new_process(FLUXION_CPU_VARIANT="sse9")
    assert said.startswith("False expected FLUXION_CPU_VARIANT to be one of ")
    assert "got sse9" in said


@pytest.mark.native
def test_the_environment_sets_variant_and_threads():
    script = (
        "from host_ops import native; about = native.info(); "
        "print(about['variant'], about['threads'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"FLUXION_CPU_VARIANT": "scalar", "FLUXION_NUM_THREADS": "3"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["scalar", "3"]


@pytest.mark.native
@pytest.mark.parametrize(
    ("chosen_us", "spins_us"), [("", "50 2000 50"), ("7", "7 7 7"), ("2000", "2000 2000 2000")]
)
def test_threads_stay_awake_for_as_long_as_the_block_unless_the_environment_says(
    chosen_us, spins_us
):
    script = """
from host_ops import native
spins_us = [native.info()["spin_us"]]
try:
    with native.awake():
        spins_us.append(native.info()["spin_us"])
        raise LookupError
except LookupError:
    spins_us.append(native.info()["spin_us"])
print(*spins_us)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"FLUXION_SPIN_US": chosen_us},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == spins_us


@pytest.mark.native
@pytest.mark.parametrize("threads", [0, -1, native.MAX_THREADS + 1])
def test_an_impossible_number_of_threads_is_refused(threads):
    with pytest.raises(ValueError, match=f"expected 1 to 1024, got {threads}"):
        native.set_threads(threads)


@pytest.mark.native
def test_an_unknown_cancel_word_is_refused():
    with pytest.raises(ValueError, match="live cancel word, got 123456789"):
        native.cancel(123456789)


@pytest.mark.native
def test_results_have_the_same_bits_for_any_number_of_threads():
    before = native.info()["threads"]
    # Several parts of every stage: granularity 16 is scored in three, and selected by heads.
    shape = cases.Shape(num_blocks=1160, head_dim=8, dtype="bfloat16")
    case = cases.random_case(shape, seed=3).with_work(
        granularity=[[16, 16, 32], [16, 64, 128]],
        shared=[[0, 1, 0], [1, 0, 0]],
        k_units=np.arange(24).reshape(2, 12) * 9,
        host_blocks=[1153, 1100],
        boundary=[[1160, 1160, 1160], [1000, 1160, 1160]],
    )
    try:
        results = []
        for threads in (1, 2, 3):
            native.set_threads(threads)
            assert native.info()["threads"] == threads
            results.append(cases.run("native", case))
        cases.check("native", case)
    finally:
        native.set_threads(before)
    for other in results[1:]:
        for name in ("out", "lse", "selection", "blocks_read"):
            a, b = getattr(results[0], name), getattr(other, name)
            np.testing.assert_array_equal(a, b, err_msg=name)
