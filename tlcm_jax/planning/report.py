"""A recipe's plan in words: what it needs, whether it fits, what to change, what it costs."""

from collections.abc import Sequence

from tlcm_jax.planning.evaluation import EvaluationPlan
from tlcm_jax.planning.stage import USABLE, StagePlan
from tlcm_jax.planning.topologies import DEVICES, GIB, Topology


def describe_stage(plan: StagePlan, topology: Topology, remat: str) -> str:
    """A stage's memory, time and traffic, and what to change if it does not fit."""
    device = topology.device
    lines = [
        f"{plan.name}: {plan.steps} steps of {plan.pairs} pairs, {plan.batch} a device at once"
    ]
    lines.append("  memory of a device, GiB")
    lines += [f"    {what:28}{size / GIB:9.2f}" for what, size in plan.memory.items()]
    verdict = "fits" if fits(plan, topology) else "DOES NOT FIT"
    lines.append(f"    {'peak':28}{plan.peak / GIB:9.2f} of {device.memory / GIB:.0f}: {verdict}")
    if not fits(plan, topology):
        lines.append(f"    {advice(plan, topology, remat)}")
    lines.append("  a step, ms")
    lines += [f"    {what:28}{1e3 * time:9.1f}" for what, time in plan.seconds.items()]
    lines.append(f"    {'step':28}{1e3 * plan.step_seconds:9.1f}")
    rate = plan.flops / plan.step_seconds / device.peak
    lines.append(
        f"  {plan.flops / 1e12:.1f} TFLOP a device and step, MFU {100 * rate:.0f} %, "
        f"{plan.pairs / plan.step_seconds:.1f} pairs/s"
    )
    sent = ", ".join(f"{what} {size / GIB:.2f} GiB" for what, size in plan.collectives.items())
    lines.append(f"  sent by a device in a step: {sent or 'nothing'}")
    lines += [f"  {note}" for note in plan.notes]
    return "\n".join(lines)


def describe_recipe(plans: Sequence[StagePlan], topology: Topology, price: float) -> str:
    """The whole recipe: time, chip-hours and, with a price of a chip-hour, the cost."""
    hours = sum(plan.steps * plan.step_seconds for plan in plans) / 3600
    chip_hours = hours * topology.chips
    text = f"whole recipe on {topology.name}: {hours:.2f} h, {chip_hours:.1f} chip-hours"
    if price:
        text += f", {price * chip_hours:.2f} at {price:g} a chip-hour"
    return text


def describe_evaluation(plan: EvaluationPlan, topology: Topology, price: float) -> str:
    """An evaluation's memory, time and cost."""
    device = topology.device
    lines = [
        f"evaluation: {plan.prompts} prompts at {plan.steps} steps, {plan.batch} images at a time"
    ]
    lines.append("  memory of a device, GiB")
    held = {**plan.weights, **{f"or {what}": size for what, size in plan.phases.items()}}
    lines += [f"    {what:32}{size / GIB:9.2f}" for what, size in held.items()]
    fit = plan.peak <= USABLE * device.memory
    verdict = "fits" if fit else "DOES NOT FIT"
    lines.append(f"    {'peak':32}{plan.peak / GIB:9.2f} of {device.memory / GIB:.0f}: {verdict}")
    if not fit and plan.batch > plan.devices:
        lines.append(f"    evaluate --batch_size {plan.devices} holds one image a device")
    lines.append("  an image on a device, ms")
    lines += [f"    {what:32}{1e3 * time:9.1f}" for what, time in plan.seconds.items()]
    chip_hours = plan.hours * topology.chips
    text = f"  all on {topology.name}: {60 * plan.hours:.1f} min, {chip_hours:.2f} chip-hours"
    lines.append(text + (f", {price * chip_hours:.2f} at {price:g} a chip-hour" if price else ""))
    lines.append("  not in it: what the host does meanwhile (resizing, files) and compilation")
    return "\n".join(lines)


def describe_basis(topology: Topology) -> str:
    """How the times were come by."""
    device = topology.device
    if not device.compiled:
        return (
            "Modelled, not measured: rooflines of each block (peak, or the memory's bandwidth for "
            "weights, inputs and results): times are lower bounds. Compilation, start, "
            "checkpoints, text encoding and evaluation are not in them."
        )
    return (
        "Modelled, not measured: one block of each kind compiled for the device, or every one; "
        f"the compiler's cycles at {device.clock / 1e9:.2f} GHz (the peak over "
        f"{device.flops_per_cycle} FLOP a cycle), attention kernels by their schedule; optimiser, "
        "merging and communication by bandwidth. Compilation, start, checkpoints, text encoding "
        "and evaluation are not in it."
    )


def fits(plan: StagePlan, topology: Topology) -> bool:
    """Whether the peak is within what a program may fill."""
    return plan.peak <= USABLE * topology.device.memory


def advice(plan: StagePlan, topology: Topology, remat: str) -> str:
    """What would make a plan fit, the cheapest first."""
    usable = USABLE * topology.device.memory
    working = plan.memory["activations kept"] + plan.memory["temporaries"]
    fixed = plan.peak - working
    if remat != "all" and fixed < usable:
        less = "blocks" if remat in ("none", "attention") else "all"
        return f'set model.remat = "{less}"'
    most = int((usable - fixed) // (working / plan.batch)) if usable > fixed else 0
    if most >= 1:
        good = max(n for n in range(1, most + 1) if plan.batch % n == 0)
        return (
            f"at most {most} a device fit: set stages.{plan.name}.accumulate to "
            f"{plan.batch // good} times what it is, or use more devices"
        )
    sharded = plan.memory["frozen weights"] + plan.memory["trained weights, optimiser"]
    for ways in (2, 4, 8, 16, 32, 64):
        if topology.devices % ways == 0 and plan.peak - sharded * (1 - 1 / ways) <= usable:
            return f"split the weights: set mesh.fsdp = {ways}"
    larger = [d.name for d in DEVICES.values() if USABLE * d.memory >= plan.peak]
    return "needs devices with more memory" + (f": {', '.join(larger)}" if larger else "")
