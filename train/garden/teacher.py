"""Training of the garden's teacher and its judge, from nothing.

    python -m kdc_edge.train.garden.teacher --out DIR      # about an hour and a quarter on two cores

Stages, each skipped when its result is in DIR: tokenizer, vae, latents, diffusion (text encoder and U-Net together),
decoder (the VAE's decoder alone, sharper, for the same latents), judge, quality. quality.json, beside the weights,
holds what was measured on the result.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from kdc_edge.diffusers_folder import PROMPTS_FILE
from kdc_edge.noise import initial_latents
from kdc_edge.presets import SCHEDULER, find_preset
from kdc_edge.request import Request
from kdc_edge.runtimes import open_pipeline
from kdc_edge.train.checkpoint import save_text_encoder
from kdc_edge.train.garden.judge import Judge, load_judge, targets, to_images
from kdc_edge.train.garden.scenes import SUBJECTS, Split, draw_scenes, render_many, scenes

START, END = "<|startoftext|>", "<|endoftext|>"
IMAGES = 8000  # of each subject
TOKENS = 77
MEASURED = Request("", steps=20, guidance=4.0, sampler="ddim")  # how the images of quality.json are made
SPLITS: tuple[Split, ...] = ("train", "heldout")


def make_tokenizer(out: Path) -> None:
    """A byte-pair vocabulary in CLIPTokenizer's format in which every word of the captions is one token."""
    words = {(*w[:-1], w[-1] + "</w>") for s in SUBJECTS for c in scenes(s) for w in c.caption.split()}
    merges: list[tuple[str, str]] = []
    while pairs := Counter(p for w in sorted(words) for p in itertools.pairwise(w)):
        best = max(pairs, key=lambda p: (pairs[p], p))
        merges.append(best)
        words = {_merge(w, best) for w in words}
    letters = sorted(ByteLevel.alphabet())
    entries = [*letters, *(c + "</w>" for c in letters), *("".join(m) for m in merges), START, END]
    out.mkdir(parents=True)
    (out / "vocab.json").write_text(json.dumps({e: i for i, e in enumerate(entries)}, ensure_ascii=False), "utf-8")
    (out / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), "utf-8")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, "bos_token": START, "eos_token": END}
    (out / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": END, "unk_token": END}, indent=2))


def _merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out: list[str] = []
    for symbol in word:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return tuple(out)


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(24, 48, 80),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            projection_dim=128,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )


def make_scheduler() -> DDIMScheduler:
    return DDIMScheduler(**SCHEDULER)


def train_judge(images: Tensor, labels: dict[str, Tensor], steps: int) -> Judge:
    """Cross-entropy on renders, blurred and made noisy at random so that generated images are read well too."""
    judge = Judge().train()
    optimizer = AdamW(judge.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        pick = torch.randint(len(images), (64,))
        x = images[pick].float() / 127.5 - 1
        if step % 3 == 0:
            x = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        x = x + torch.randn_like(x) * (0.12 * torch.rand(len(x), 1, 1, 1))
        loss = torch.stack([F.cross_entropy(p, labels[n][pick]) for n, p in judge(x).items()]).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        _say("judge", step, steps, loss)
    return judge.eval()


def train_vae(images: Tensor, steps: int) -> AutoencoderKL:
    """L1 + L2 + a light Kullback-Leibler term; the scaling factor makes the latents' std 1."""
    vae = make_vae().train()
    optimizer = AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        x = images[torch.randint(len(images), (16,))].float() / 127.5 - 1
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        l2 = F.mse_loss(y, x)
        loss = F.l1_loss(y, x) + l2 + 1e-3 * kl
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        _say("vae", step, steps, l2, f"psnr {10 * math.log10(4 / l2.item()):.1f} dB")
    vae.eval()
    with torch.inference_mode():
        latents = vae.encode(images[::48].float() / 127.5 - 1).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    return vae


def train_decoder(vae: AutoencoderKL, images: Tensor, latents: dict[str, Tensor], steps: int) -> AutoencoderKL:
    """More steps for the decoder alone: the U-Net's latents stay as they are, the images get sharper."""
    trained = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    optimizer = AdamW(trained, lr=1e-3, weight_decay=0.0, fused=True)
    schedule = OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        pick = torch.randint(len(images), (16,))
        x = images[pick].float() / 127.5 - 1
        z = latents["mean"][pick] + 0.5 * latents["std"][pick] * torch.randn_like(latents["std"][pick])
        y = vae.decode(z / vae.config.scaling_factor).sample
        l2 = F.mse_loss(y, x)
        loss = F.l1_loss(y, x) + 2 * l2
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        _say("decoder", step, steps, l2, f"psnr {10 * math.log10(4 / l2.item()):.1f} dB")
    return vae.eval()


@torch.inference_mode()
def encode(vae: AutoencoderKL, images: Tensor) -> dict[str, Tensor]:
    """Scaled posterior means and stds (N, 4, 16, 16)."""
    means, stds = [], []
    for batch in torch.split(images, 100):
        posterior = vae.encode(batch.float() / 127.5 - 1).latent_dist
        means.append(posterior.mean * vae.config.scaling_factor)
        stds.append(posterior.std * vae.config.scaling_factor)
    return {"mean": torch.cat(means).contiguous(), "std": torch.cat(stds).contiguous()}


def train_diffusion(
    latents: dict[str, Tensor],
    tokens: Tensor,
    empty: Tensor,
    unet: UNet2DConditionModel,
    text: CLIPTextModel,
    steps: int,
    out: Path,
) -> None:
    """Noise prediction with one caption in ten empty; what is kept is the moving average of the weights.

    The loss is weighted by min(SNR, 5) / SNR (Hang et al., arXiv 2303.09556), so that the noisy timesteps, where
    petals are counted, are not drowned by the clear ones. A peak of 2e-3 diverged after 750 steps.
    """
    nets = nn.ModuleDict({"unet": unet.train(), "text": text.train()})
    averaged = torch.optim.swa_utils.AveragedModel(nets, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998))  # type: ignore[no-untyped-call]
    optimizer = AdamW(nets.parameters(), lr=1.2e-3, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    schedule = OneCycleLR(optimizer, 1.2e-3, total_steps=steps, pct_start=0.08, cycle_momentum=False)
    alphas = make_scheduler().alphas_cumprod
    weights = (5 * (1 - alphas) / alphas).clamp(max=1)
    smooth = None
    for step in range(steps):
        pick = torch.randint(len(tokens), (32,))
        x = latents["mean"][pick] + latents["std"][pick] * torch.randn(32, 4, 16, 16)
        ids = torch.where(torch.rand(32, 1) < 0.1, empty, tokens[pick])
        t = torch.randint(1000, (32,))
        a = alphas[t].view(-1, 1, 1, 1)
        noise = torch.randn_like(x)
        noise_pred = unet(a.sqrt() * x + (1 - a).sqrt() * noise, t, text(ids).last_hidden_state).sample
        loss = (weights[t] * F.mse_loss(noise_pred, noise, reduction="none").mean((1, 2, 3))).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(nets.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        averaged.update_parameters(nets)
        smooth = loss.item() if smooth is None else 0.99 * smooth + 0.01 * loss.item()
        _say("diffusion", step, steps, loss, f"smooth {smooth:.4f}")
    _save_average(averaged, unet.config, text.config, out)


def _save_average(averaged: nn.Module, unet_config: dict[str, object], text_config: CLIPTextConfig, out: Path) -> None:
    unet, text = UNet2DConditionModel.from_config(unet_config), CLIPTextModel(text_config)
    nn.ModuleDict({"unet": unet, "text": text}).load_state_dict(averaged.get_submodule("module").state_dict())
    unet.save_pretrained(out / "unet")
    save_text_encoder(text, out / "text_encoder")


def assemble(out: Path, work: Path, unet: UNet2DConditionModel, text: CLIPTextModel) -> Path:
    """Write the diffusers folder, in fp16 safetensors."""
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(work / "vae-final"),
        text_encoder=text.eval(),
        tokenizer=CLIPTokenizer.from_pretrained(work / "tokenizer"),
        unet=unet.eval(),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(out)
    save_text_encoder(pipeline.text_encoder, out / "text_encoder")
    shutil.rmtree(out / "tokenizer")  # transformers 5 writes no vocab.json; every other program reads it
    shutil.copytree(work / "tokenizer", out / "tokenizer")
    captions = [s.caption for subject in SUBJECTS for s in draw_scenes(subject, 32, seed=0)]
    (out / PROMPTS_FILE).write_text("".join(f"{c}\n" for c in dict.fromkeys(captions)))
    for network in (out / "unet" / "config.json", out / "vae" / "config.json"):
        config = json.loads(network.read_text())
        del config["_name_or_path"]  # a folder of the machine that made it
        network.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for path in out.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes for its owner alone
    return out


def measure(teacher: Path, judge: Judge, count: int = 64) -> dict[str, dict[str, float]]:
    """Prompt accuracy on trained and on held-out combinations."""
    pipeline = open_pipeline(teacher)
    noise = initial_latents((count, *pipeline.latent_shape(MEASURED)[1:]), 77)
    found = {}
    for subject, split in itertools.product(SUBJECTS, SPLITS):
        chosen = draw_scenes(subject, count, seed=77, split=split)
        requests = [replace(MEASURED, prompt=s.caption, latents=noise[i : i + 1]) for i, s in enumerate(chosen)]
        found[f"{subject} {split}"] = judge.agreement(np.stack(pipeline.generate_batch(requests)), chosen)
    return found


def _stack(images: np.ndarray) -> Tensor:
    """uint8 (N, H, W, 3) -> uint8 (N, 3, H, W)."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def _say(stage: str, step: int, steps: int, loss: Tensor, more: str = "") -> None:
    if step % 50 == 49 or step + 1 == steps:
        print(
            f"{time.strftime('%H:%M:%S')} {stage} {step + 1}/{steps} loss {loss.item():.4f} {more}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the garden's teacher and judge.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, default=1500)
    parser.add_argument("--diffusion-steps", type=int, nargs="+", default=[2200, 2300, 3500])
    parser.add_argument("--decoder-steps", type=int, default=1600)
    parser.add_argument("--judge-steps", type=int, default=900)
    args = parser.parse_args()
    work: Path = args.out / "work"
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    chosen = [s for subject in SUBJECTS for s in draw_scenes(subject, IMAGES, seed=args.seed)]
    if not (work / "tokenizer").exists():
        make_tokenizer(work / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    if not all((work / made).exists() for made in ("vae-final", "latents.safetensors")):
        images = _stack(render_many(chosen, seed=args.seed))
    if not (work / "vae").exists():
        train_vae(images, args.vae_steps).save_pretrained(work / "vae")
    if not (work / "latents.safetensors").exists():
        vae = AutoencoderKL.from_pretrained(work / "vae").eval()
        save_file(encode(vae, images), work / "latents.safetensors")
    latents = load_file(work / "latents.safetensors")
    texts = [s.caption for s in chosen]
    tokens = tokenizer(texts, padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
    empty = tokenizer("", padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
    unet = UNet2DConditionModel(**find_preset("garden-teacher").unet)
    text = make_text_encoder(tokenizer)
    for round_, steps in enumerate(args.diffusion_steps, start=1):  # each starts from the average of the one before
        result = work / f"round-{round_}"
        if not result.exists():
            train_diffusion(latents, tokens, empty, unet, text, steps, result)
        unet = UNet2DConditionModel.from_pretrained(result / "unet")
        text = CLIPTextModel.from_pretrained(result / "text_encoder")
    if not (work / "vae-final").exists():
        vae = AutoencoderKL.from_pretrained(work / "vae")
        train_decoder(vae, images, latents, args.decoder_steps).save_pretrained(work / "vae-final")
    judge_file = args.out / "judge" / "judge.safetensors"
    if not judge_file.exists():
        everything = [s for subject in SUBJECTS for s in draw_scenes(subject, 3000, seed=1, split="all")]
        judge = train_judge(_stack(render_many(everything, seed=1)), targets(everything), args.judge_steps)
        judge_file.parent.mkdir(parents=True)
        save_file({k: v.half().contiguous() for k, v in judge.state_dict().items()}, judge_file)
    judge = load_judge(judge_file)
    vae = AutoencoderKL.from_pretrained(work / "vae-final").eval()
    fresh = [s for subject in SUBJECTS for s in draw_scenes(subject, 500, seed=2, split="all")]
    fresh_images = render_many(fresh, seed=2)
    with torch.inference_mode():
        x = to_images(fresh_images[::5])
        error = F.mse_loss(vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1), x).item()
    quality = {
        "judge on fresh renders": judge.agreement(fresh_images, fresh),
        "vae psnr db": round(10 * math.log10(4 / error), 2),
        "prompt accuracy": measure(assemble(args.out / "garden-teacher", work, unet, text), judge),
        "conditions": f"{MEASURED.conditions}, 64 prompts a row, fp32",
    }
    (args.out / "garden-teacher" / "quality.json").write_text(json.dumps(quality, indent=2) + "\n")
    print(json.dumps(quality, indent=2))


if __name__ == "__main__":
    main()
