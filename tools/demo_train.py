"""Trains the demo model: tokenizer, base, three adapters; writes them with the held-out requests.

    python tools/demo_train.py --out milpy/demo          (some minutes on one large GPU)

Everything is seeded and drawn by `demo_corpus.py`. Training is float32 (bf16 autocast on a GPU);
the base is rounded to bf16 *before* the adapters are trained on it, so that they fit what is
stored. Scores are of the stored bf16 weights read as float32. Needs torch, transformers, peft.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.pool import Pool
from pathlib import Path

from demo_options import end_without, train_parser

try:
    import demo_corpus as corpus
    import demo_grammar as grammar
    import demo_score
    import numpy as np
    import torch
    from peft import LoraConfig, get_peft_model
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
except ModuleNotFoundError as problem:
    end_without(problem, __name__, train_parser(__doc__))

SEED = 20261123
HELD_OUT_PER_KIND = 18
VOCABULARY = 2000  # an upper bound: the closed vocabularies give fewer merges
# GPT-2's split without its English contractions, which would tear SQL's 'melon' into 'm and elon.
SPLIT = r" ?\p{N}+| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Unlike ranks and unlike rules for the scale, so that serving them tests both.
ADAPTERS = {
    "sql": {"r": 4, "lora_alpha": 10, "use_rslora": False},
    "json": {"r": 8, "lora_alpha": 5, "use_rslora": True},
    "french": {"r": 16, "lora_alpha": 24, "use_rslora": False},
}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


WIDTH = 192  # tokens of a training text


@dataclass(frozen=True)
class Plan:
    """One training run. Whichever of steps and seconds ends first ends it, and the learning rate
    follows that one, so that a slow machine still anneals."""

    batch: int
    steps: int
    seconds: float
    rate: float
    device: str


# ---- data ----


def train_tokenizer(folder: Path, pool: Pool) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(corpus.SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    shares = pool.map(corpus.draw_texts, [(SEED + i, 2500) for i in range(16)])
    tokenizer.train_from_iterator((text for share in shares for text in share), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", corpus.BOS)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=corpus.CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def encode(base: Path, voice: str, texts: int, pool: Pool) -> tuple[np.ndarray, np.ndarray]:
    """Training texts of one voice: (tokens [texts, WIDTH], learnt [texts, WIDTH])."""
    start = SEED + 1000 * (1 + grammar.VOICES.index(voice))
    file = str(base / "tokenizer.json")
    jobs = [(file, voice, start + i, -(-texts // 48), WIDTH) for i in range(48)]
    tokens, learnt = zip(*pool.map(corpus.encode_share, jobs, chunksize=1), strict=True)
    return np.concatenate(tokens), np.concatenate(learnt)


def batches(
    data: tuple[np.ndarray, np.ndarray], plan: Plan
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches without end: (ids [B, WIDTH], learnt [B, WIDTH]), every text once per round."""
    tokens, learnt = (torch.from_numpy(part).to(plan.device) for part in data)
    rng = np.random.default_rng(SEED)
    while True:
        order = torch.from_numpy(rng.permutation(len(tokens))).to(plan.device)
        for rows in order.split(plan.batch)[: max(1, len(order) // plan.batch)]:
            yield tokens[rows], learnt[rows]


# ---- training ----


class Muon:
    """Momentum, made orthogonal by five Newton-Schulz steps (Jordan et al. 2024) and scaled to
    AdamW's step size (Liu et al. 2025, arXiv 2502.16982). Matrices of one shape are stacked, so
    that a step is a few large products."""

    def __init__(self, weights: list[torch.nn.Parameter]) -> None:
        shapes: dict[torch.Size, list[torch.nn.Parameter]] = {}
        for weight in weights:
            shapes.setdefault(weight.shape, []).append(weight)
        self.groups = [
            (group, torch.zeros(len(group), *shape, device=group[0].device))
            for shape, group in shapes.items()
        ]

    @torch.no_grad()
    def step(self, rate: torch.Tensor, decay: float) -> None:
        for group, momentum in self.groups:
            gradients = torch.stack([weight.grad for weight in group])
            momentum.lerp_(gradients, 0.05)
            update = self._orthogonal(gradients.lerp(momentum, 0.95))
            update *= rate * (0.2 * max(update.shape[1:]) ** 0.5)
            torch._foreach_mul_(group, 1 - rate * decay)
            torch._foreach_sub_(group, list(update.unbind()))

    @staticmethod
    def _orthogonal(stack: torch.Tensor) -> torch.Tensor:
        x = stack.bfloat16()
        tall = x.shape[1] > x.shape[2]
        x = x.mT if tall else x
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(5):
            a = x @ x.mT
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
        return (x.mT if tall else x).float()


class Trainer:
    """One training step: a base's matrices by Muon, the rest and an adapter by AdamW.

    On a GPU the whole step is one CUDA graph, since so small a model is otherwise bound by its
    kernel launches: hence the static buffers, the rate in a tensor and the loss over all rows."""

    def __init__(self, model: LlamaForCausalLM, plan: Plan) -> None:
        self.model, self.cuda = model, plan.device == "cuda"
        whole = all(p.requires_grad for p in model.parameters())
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        matrices = [p for n, p in named if whole and n.endswith("proj.weight")]
        others = [p for n, p in named if not (whole and n.endswith("proj.weight"))]
        self.weights = [p for _, p in named]
        self.rate = torch.zeros((), device=plan.device)
        self.muon = Muon(matrices)
        self.adam = torch.optim.AdamW(
            others,
            lr=self.rate,
            betas=(0.9, 0.98),
            weight_decay=0,
            fused=self.cuda,
            foreach=False,
            capturable=self.cuda,
        )
        self.ids = torch.zeros(plan.batch, WIDTH, dtype=torch.long, device=plan.device)
        self.targets = self.ids.clone()
        self.positions = torch.arange(WIDTH, device=plan.device)[None]
        self.loss = torch.zeros((), device=plan.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        if self.cuda:  # one layer is compiled and serves all six; where that fails, all run eagerly
            torch._dynamo.config.suppress_errors = True
            for layer in model.model.layers:
                layer.compile()

    def feed(self, ids: torch.Tensor, learnt: torch.Tensor, rate: float) -> None:
        self.ids.copy_(ids)
        self.targets.copy_(torch.where(learnt, ids.long(), -100))
        self.rate.fill_(rate)

    def run(self) -> None:
        if self.graph is not None:
            self.graph.replay()
        else:
            self._step()

    def capture(self) -> None:
        """After some eager steps on a side stream. A failure is said, and steps stay eager."""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._step()
        except RuntimeError as error:
            print(f"no CUDA graph, steps stay eager: {error}", flush=True)
        else:
            self.graph = graph

    def _hidden(self) -> torch.Tensor:
        """LlamaModel's forward without a mask or a cache, both of which would be made anew."""
        inner = self.model.model
        hidden = inner.embed_tokens(self.ids)
        rotary = inner.rotary_emb(hidden, position_ids=self.positions)
        for layer in inner.layers:
            hidden = layer(
                hidden,
                attention_mask=None,
                position_ids=self.positions,
                position_embeddings=rotary,
                use_cache=False,
            )
        return inner.norm(hidden)

    def _step(self) -> None:
        self.model.zero_grad(set_to_none=True)
        device = "cuda" if self.cuda else "cpu"
        with torch.autocast(device, torch.bfloat16, enabled=self.cuda, cache_enabled=False):
            logits = self.model.lm_head(self._hidden())
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), self.targets[:, 1:].flatten(), ignore_index=-100
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.muon.step(self.rate, 0.05)
        self.adam.step()
        self.loss.copy_(loss.detach())


def learn(
    model: LlamaForCausalLM, data: tuple[np.ndarray, np.ndarray], plan: Plan, name: str
) -> None:
    """Trains what requires a gradient, with warm-up and cosine."""
    model.train()
    trainer = Trainer(model, plan)
    side = torch.cuda.Stream() if trainer.cuda else None
    begun = time.monotonic()
    for step, (ids, learnt) in enumerate(batches(data, plan)):
        if trainer.cuda and step % 50 == 0:
            torch.cuda.synchronize()  # so that time spent is the device's
        spent = time.monotonic() - begun
        done = max(step / plan.steps, spent / plan.seconds)
        if done >= 1:
            break
        rate = plan.rate * min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * done))
        trainer.feed(ids, learnt, rate)
        if side is not None and step < 4:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                trainer.run()
            torch.cuda.current_stream().wait_stream(side)
            if step == 3:
                trainer.capture()
        else:
            trainer.run()
        if step % 250 == 0:
            print(f"{name}: step {step}, loss {trainer.loss.item():.5f}, {spent:.0f} s", flush=True)
    model.eval()
    print(f"{name}: {step} steps, {spent:.0f} s, loss {trainer.loss.item():.6f}", flush=True)


def new_base(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=256,
            intermediate_size=640,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=1024,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            initializer_range=0.04,
            tie_word_embeddings=True,
            pad_token_id=corpus.PAD,
            bos_token_id=corpus.BOS,
            eos_token_id=corpus.EOS,
        )
    )
    # Chat answers close with <|end|>, notes with </s>: both end a generation.
    model.generation_config.eos_token_id = [corpus.EOS, corpus.END]
    return model


def train_base(out: Path, data: tuple[np.ndarray, np.ndarray], plan: Plan) -> None:
    base = out / "base"
    vocabulary = Tokenizer.from_file(str(base / "tokenizer.json")).get_vocab_size()
    model = new_base(vocabulary).to(plan.device)
    size = sum(p.numel() for p in model.parameters())
    print(
        f"base: {size:,} parameters, vocabulary {vocabulary}, {data[0].size:,} tokens", flush=True
    )
    learn(model, data, plan, "base")
    model.to(torch.bfloat16).save_pretrained(base)


def train_adapter(out: Path, voice: str, data_file: str, plan: Plan) -> None:
    data = np.load(data_file)
    model = LlamaForCausalLM.from_pretrained(out / "base", dtype=torch.float32).to(plan.device)
    torch.manual_seed(SEED)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=PROJECTIONS,
        lora_dropout=0.0,
        **ADAPTERS[voice],
    )
    adapted = get_peft_model(model, config)
    learn(adapted.get_base_model(), (data["tokens"], data["learnt"]), plan, voice)
    folder = out / "adapters" / voice
    adapted.to(torch.bfloat16)
    adapted.peft_config["default"].base_model_name_or_path = "milpy-demo"
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card


def write_requests(out: Path) -> None:
    requests = [
        {
            "id": f"{i:03d}-{request.kind}",
            "kind": request.kind,
            "text": request.text,
            "answers": grammar.answers(request),
        }
        for i, request in enumerate(grammar.draw_held_out(SEED, HELD_OUT_PER_KIND))
    ]
    text = json.dumps({"seed": SEED, "requests": requests}, indent=1, ensure_ascii=False)
    (out / "requests.json").write_text(text + "\n", encoding="utf-8")


def main() -> None:
    args = train_parser(__doc__).parse_args()
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    adapters = [voice for voice in args.only if voice in ADAPTERS]
    base_plan = Plan(args.batch, args.base_steps, args.base_seconds, 2e-3, args.device)
    plan = Plan(args.batch, args.adapter_steps, args.adapter_seconds, 3e-3, args.device)

    # Forked first, while this process has no threads and no device.
    with (
        multiprocessing.get_context("fork").Pool(args.workers) as pool,
        ProcessPoolExecutor(3, multiprocessing.get_context("spawn")) as trainers_,
        tempfile.TemporaryDirectory() as scratch,
    ):
        for _ in adapters:
            trainers_.submit(int)  # starts its process, which imports torch meanwhile
        if "base" in args.only:
            write_requests(out)
            train_tokenizer(out / "base", pool)
            train_base(out, encode(out / "base", "base", args.texts, pool), base_plan)
            learnt = demo_score.score_voice(out, "base", args.device)["base"]
            if adapters and learnt < args.base_bar:
                raise SystemExit(f"base: {learnt:.3f} exact, expected {args.base_bar} or more")
        jobs = []
        for voice in adapters:
            tokens, learnt = encode(out / "base", voice, args.texts // 4, pool)
            file = f"{scratch}/{voice}.npz"
            np.savez(file, tokens=tokens, learnt=learnt)
            # Side by side: one such model alone leaves most of a GPU idle.
            jobs.append(trainers_.submit(train_adapter, out, voice, file, plan))
        for job in jobs:
            job.result()
    if (out / "adapters" / "french").exists():
        for voice in grammar.VOICES:
            demo_score.print_scores(voice, demo_score.score_voice(out, voice, args.device))


if __name__ == "__main__":
    main()
