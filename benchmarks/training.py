"""Time of an update of stage 1: this library against plain PyTorch with PEFT, on one machine.

    python -m benchmarks.training --config configs/shapes.py

Both do what a refill of the recipe's first stage asks for: the guided teacher's paths of some
prompts, and the updates that their pairs make. Weights, embeddings, noise, times and numbers of
pairs are the same, and so is what they compute: the program ends where their pairs or the losses of
these differ by more than 1e-3 (before its first update an adapter changes nothing). The other side
is what one writes by hand: diffusers' UNet twice, once with PEFT's LoRA beside its weights, both
through `torch.compile`, and AdamW. They take turns (ours, theirs, ours, theirs) after both have
compiled; medians are compared. On the GPU where both have one. Needs `pip install -e '.[verify]'`.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.sampling import restrict_cores
from benchmarks.save_share import read_recipe

TOLERANCE = 1e-3


class Ours:
    """A recipe's first stage, and the prompts of its first refill, again and again."""

    def __init__(self, path: Path):
        """Reads the recipe and its model, and encodes the prompts."""
        import jax

        from tlcm_jax.config.build import initial_trainable, load_losses, stage_spec
        from tlcm_jax.config.run import PromptBatches, frozen_params, load_teacher
        from tlcm_jax.config.schema import read
        from tlcm_jax.data.prompts import read_prompts
        from tlcm_jax.training.begin import initial
        from tlcm_jax.training.mesh import make_mesh
        from tlcm_jax.training.sharding import RULES, place
        from tlcm_jax.training.stage import Stage

        settings = read(read_recipe(path, updates=1))
        ((name, chosen),) = settings.stages.items()
        mesh = make_mesh(settings.mesh)
        model = load_teacher(settings.model, mesh)
        loss = load_losses(settings, model)[name]
        texts = read_prompts(settings.prompts)
        batch = PromptBatches(model, texts, mesh, settings).of(name, loss)(0)
        null = place(model.null_conditioning(settings.model.size), mesh)
        spec = stage_spec(name, chosen, loss, mesh, lambda r: batch, frozen_params(model, null))
        adapter_key, key = jax.random.split(jax.random.key(0))
        trainable = initial_trainable(settings, model, adapter_key)
        self.settings, self.chosen, self.spec, self.batch = settings, chosen, spec, batch
        self.process, self.objective = model.process, loss.objective
        self.stage = Stage(spec, mesh)
        self.state = initial(trainable, spec, key, 0, mesh, RULES)

    def pairs(self) -> tuple[Any, np.ndarray]:
        """The first refill's pairs, a prompt's side by side, and the loss of each."""
        import jax

        params, frozen = self.state.student.params, self.spec.frozen
        pairs = self.stage.stream.draw(params, frozen, self.batch, self.state.key, np.uint32(0))
        keys = jax.random.split(jax.random.key(0), len(pairs.t_m))
        loss = jax.jit(lambda *given: self.spec.loss(*given, {}))
        losses, _ = loss(params, frozen, pairs, keys)
        return pairs, np.asarray(losses)

    def refill(self, number: int) -> None:
        """Draws pairs, and trains on all of them."""
        for update in range(self.spec.pairs.steps_per_refill):
            step = number * self.spec.pairs.steps_per_refill + update
            pairs = self.stage.stream.next(step, self.state, self.spec.frozen)
            self.state, metrics = self.stage.step(self.state, self.spec.frozen, pairs)
        float(metrics["loss"])


class Theirs:
    """The same stage in PyTorch; latents are `[n, c, h, w]`."""

    def __init__(self, ours: Ours, pairs: Any):
        """Takes the weights from the model's folder, and all that is drawn from `pairs`."""
        import diffusers
        import peft
        import torch

        from tlcm_jax.models.lora import TARGETS

        self.torch, chosen, settings = torch, ours.chosen, ours.settings
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = getattr(torch, settings.model.dtype)

        def network() -> Any:
            unet = diffusers.UNet2DConditionModel.from_pretrained(
                settings.model.path, subfolder="unet", torch_dtype=dtype, local_files_only=True
            )
            return unet.to(device).requires_grad_(False)

        def given(array: Any, kind: Any = torch.float32) -> Any:
            return torch.tensor(np.asarray(array, np.float32), device=device).to(kind)

        def texts(conditioning: Any, count: int) -> tuple[Any, ...]:
            fields = (conditioning.prompt_embeds, conditioning.pooled, conditioning.time_ids)
            return tuple(given(x, dtype).expand(count, *x.shape[1:]) for x in fields)

        teacher, student = network(), network()
        student.add_adapter(
            peft.LoraConfig(
                r=settings.adapter.rank,
                lora_alpha=settings.adapter.alpha,
                target_modules=list(TARGETS),
            )
        )
        self.trained = [leaf for leaf in student.parameters() if leaf.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=chosen.learning_rate, eps=chosen.adam_eps, weight_decay=0.0
        )
        self.teacher, self.student = torch.compile(teacher), torch.compile(student)
        self.chosen, self.prediction = chosen, ours.process.prediction_type
        table = np.arange(ours.process.num_train_timesteps)
        self.alpha, self.sigma = given(ours.process.alpha(table)), given(ours.process.sigma(table))
        count = ours.spec.pairs.prompts
        self.texts = texts(ours.batch["conditioning"], count)
        self.null = texts(ours.spec.frozen["null"], count)
        self.t_m, self.t_n, self.until = (
            given(x).long() for x in (pairs.t_m, pairs.t_n, pairs.target_time)
        )
        z = given(np.moveaxis(np.asarray(pairs.z_m), -1, 1))
        # A path's first point is the noise that it begins with.
        self.noise = z.unflatten(0, (count, -1))[:, 0].contiguous()

    def x0(self, unet: Any, z: Any, t: Any, texts: tuple[Any, ...]) -> Any:
        """A network's prediction as x0."""
        states, pooled, time_ids = texts
        raw = unet(
            z.to(states.dtype), t, states,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids}, return_dict=False,
        )[0].float()  # fmt: skip
        alpha, sigma = (table[t][:, None, None, None] for table in (self.alpha, self.sigma))
        if self.prediction == "epsilon":
            return (z - sigma * raw) / alpha
        return raw if self.prediction == "sample" else alpha * z - sigma * raw

    def ddim(self, z: Any, x0: Any, t: Any, s: Any) -> Any:
        """The deterministic step from t to s."""
        ratio = (self.sigma[s] / self.sigma[t])[:, None, None, None]
        rest = self.alpha[s][:, None, None, None] - ratio * self.alpha[t][:, None, None, None]
        return ratio * z + rest * x0

    def pairs(self) -> tuple[Any, Any]:
        """The states of the guided teacher's paths, and where it goes on to from each."""
        torch, guidance = self.torch, self.chosen.settings.guidance_scale
        both = tuple(torch.cat(pair) for pair in zip(self.null, self.texts, strict=True))
        times = self.t_m.unflatten(0, (len(self.noise), -1)).T
        z, states, answers = self.noise, [], []
        with torch.no_grad():
            for number, t in enumerate(times):
                blank, named = self.x0(
                    self.teacher, torch.cat([z, z]), torch.cat([t, t]), both
                ).chunk(2)
                x0 = blank + guidance * (named - blank)
                states.append(z)
                answers.append(x0)
                if number + 1 < len(times):
                    z = self.ddim(z, x0, t, times[number + 1])
            z_m, x0 = (torch.stack(each, 1).flatten(0, 1) for each in (states, answers))
            return z_m, self.ddim(z_m, x0, self.t_m, self.t_n)

    def losses(self, z_m: Any, z_n: Any, rows: Any) -> Any:
        """The loss of some pairs, `[n]`."""
        copies = len(self.t_m) // len(self.noise)
        texts = tuple(leaf[rows // copies] for leaf in self.texts)
        t_m, t_n, until = (each[rows] for each in (self.t_m, self.t_n, self.until))
        with self.torch.no_grad():
            theirs = self.ddim(z_n[rows], self.x0(self.student, z_n[rows], t_n, texts), t_n, until)
        ours = self.ddim(z_m[rows], self.x0(self.student, z_m[rows], t_m, texts), t_m, until)
        return (ours - theirs).square().mean((1, 2, 3))

    def refill(self, number: int) -> None:
        """Draws pairs, and trains on all of them."""
        del number
        z_m, z_n = self.pairs()
        order = self.torch.randperm(len(z_m), device=z_m.device)
        for rows in order.split(self.chosen.batch_size):
            self.optimizer.zero_grad(set_to_none=True)
            self.losses(z_m, z_n, rows).mean().backward()
            self.torch.nn.utils.clip_grad_norm_(self.trained, self.chosen.max_grad_norm)
            self.optimizer.step()
        if z_m.is_cuda:
            self.torch.cuda.synchronize()

    def difference(self, pairs: Any, losses: np.ndarray) -> float:
        """The largest relative difference to our pairs and to their losses."""
        z_m, z_n = self.pairs()
        rows = self.torch.arange(len(z_m), device=z_m.device)
        with self.torch.no_grad():
            found = self.torch.cat(
                [self.losses(z_m, z_n, r) for r in rows.split(self.chosen.batch_size)]
            )
        wanted = (np.moveaxis(np.asarray(z), -1, 1) for z in (pairs.z_m, pairs.z_n))
        return max(
            float(np.linalg.norm(mine.cpu().numpy() - own) / np.linalg.norm(own))
            for mine, own in zip((z_m, z_n, found), (*wanted, losses), strict=True)
        )


def seconds(refill: Callable[[int], None], numbers: range) -> list[float]:
    """Of single refills."""
    found = []
    for number in numbers:
        begun = time.perf_counter()
        refill(number)
        found.append(time.perf_counter() - begun)
    return found


def main() -> None:
    """Prints both sides' medians, and what ours are of theirs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="its first stage is mlcd")
    parser.add_argument("--refills", type=int, default=4, help="of each turn")
    parser.add_argument("--threads", type=int, default=0, help="cores for both; 0 takes all")
    args = parser.parse_args()
    threads = restrict_cores(args.threads)
    import jax
    import torch

    torch.set_num_threads(threads)
    ours = Ours(args.config)
    pairs, losses = ours.pairs()
    theirs = Theirs(ours, pairs)
    apart = theirs.difference(pairs, losses)
    print(f"pairs and losses differ by {apart:.1e}, relative", flush=True)
    if not apart < TOLERANCE:
        raise SystemExit(f"error: that is above {TOLERANCE}: the two do not compute the same")
    sides = {
        f"tlcm_jax, jax {jax.__version__} ({jax.default_backend()})": ours.refill,
        f"torch {torch.__version__}, compiled": theirs.refill,
    }
    for refill in sides.values():
        refill(0)
    times: dict[str, list[list[float]]] = {name: [] for name in sides}
    for turn in range(2):
        for name, refill in sides.items():
            first = 1 + turn * args.refills
            times[name].append(seconds(refill, range(first, first + args.refills)))
    updates = ours.spec.pairs.steps_per_refill
    print(f"{threads} cores, load {os.getloadavg()[0]:.1f}, {updates} updates of a refill")
    medians = []
    for name, turns in times.items():
        medians.append(statistics.median(sum(turns, [])))
        each = ", ".join(f"{1e3 * statistics.median(turn) / updates:.0f}" for turn in turns)
        print(f"{1e3 * medians[-1] / updates:8.1f} ms an update  {name}; turns {each}")
    print(f"ours takes {medians[0] / medians[1]:.2f} of the other's time")


if __name__ == "__main__":
    main()
