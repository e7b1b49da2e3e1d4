import pytest

from tlcm_jax.planning.cycles import Kernel, read_program

CYCLES = 'backend_config={"window_config":{"estimated_cycles":"%d"}}'
Q = "bf16[1,2,1024,64]{3,2,1,0}"
CALL = (
    f'custom_call_target="tpu_custom_call", operand_layout_constraints={{s8[1,4,4]{{2,1,0}}, {Q}}}'
)
# As XLA writes it; a kernel's attributes break over lines.
TEXT = f"""HloModule jit_f, is_scheduled=true

%fused (p: bf16[4]) -> bf16[4] {{
  ROOT %inner = bf16[4]{{0}} copy(%p), {CYCLES % 1000000}
}}

%body (arg: (s32[], bf16[4])) -> (s32[], bf16[4]) {{
  %f.1 = bf16[4]{{0}} fusion(%x), kind=kLoop, calls=%fused, {CYCLES % 7}
  %all-reduce.1 = (f32[8,2]{{1,0}}, bf16[4]{{0}}) all-reduce(%a, %b), to_apply=%add
  ROOT %t = (s32[], bf16[4]{{0}}) tuple(%i, %f.1)
}}

%condition (arg: (s32[], bf16[4])) -> pred[] {{
  %limit = s32[]{{:T(128)}} constant(5)
  ROOT %c = pred[] compare(%i, %limit), direction=LT
}}

ENTRY %main.4 (q: bf16[1,2,1024,64]) -> bf16[4] {{
  %copy.2 = bf16[4]{{0}} copy(%q), {CYCLES % 100}
  %k.1 = (f32[9,128]{{1,0}}, {Q}) custom-call(%m, %q), {CALL}, frontend_attributes={{metadata={{
"xprof_metadata":"{{}}"
}}}}, metadata={{op_name="jit(f)/splash_mha_fwd_residuals/pallas_call" stack_frame_id=1}}
  %all-gather-start.1 = (bf16[2]{{0}}, bf16[8]{{0}}) all-gather-start(%x), dimensions={{0}}
  %all-gather-done.1 = bf16[8]{{0}} all-gather-done(%all-gather-start.1)
  ROOT %while.1 = (s32[], bf16[4]{{0}}) while(%t), condition=%condition, body=%body
}}
"""


def test_loops_turn_and_fusions_count_once():
    assert read_program(TEXT).cycles == 100 + 5 * 7


def test_kernels_and_collectives_are_listed():
    reading = read_program(TEXT)
    kernel = Kernel(name="splash_mha_fwd_residuals", shape=(1, 2, 1024, 64), turns=1)
    assert reading.kernels == (kernel,)
    assert reading.collectives == {"all-reduce": 5 * (8 * 2 * 4 + 4 * 2), "all-gather": 2 * 10}


def test_a_known_trip_count_wins():
    known = TEXT.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"3"}}')
    assert read_program(known).cycles == 100 + 3 * 7


def test_what_does_not_tell_its_turns_is_refused():
    with pytest.raises(ValueError, match="how often it turns"):
        read_program(TEXT.replace("constant(5)", "parameter(1)"))
    with pytest.raises(ValueError, match="no entry"):
        read_program("")


def test_a_kernel_is_known_by_its_largest_operand():
    one = TEXT.replace("bf16[1,2,1024,64]{3,2,1,0}", "bf16[2,1024,64]{2,1,0}")
    assert read_program(one).kernels[0].shape == (2, 1024, 64)
