"""Many answers at once are what each is alone, whatever the architecture, the lengths and the guesses."""

import random
import warnings

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from test_packing import ARCHITECTURES, COMMON
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, Phi3Config, T5Config, T5ForConditionalGeneration

from finetune_nb import generation
from finetune_nb.config import ConfigError
from finetune_nb.generation import Guesser, Sampling, Source, _Writer, continuations, greedy, why_not_in_slots
from finetune_nb.losses import inner_model

SLOW = {"bloom", "mamba", "mamba2", "falcon with alibi"}
SETTINGS = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=[7, 9], pad_token_id=0)


def made(config, seed=0, **options):
    "A model with weights so large that its answers vary."
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, **options).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1 and "embed" not in name:
                p.mul_(4)
    return model


def mixed_prompts(n=9, seed=0, top=64):
    "Prompts of 3 to 60 tokens: most begin alike, one is another's beginning, two are equal."
    rng = random.Random(seed)
    system = [rng.randrange(10, top) for _ in range(18)]
    prompts = [system + [rng.randrange(10, top) for _ in range(rng.choice((1, 4, 9, 20, 42)))] for _ in range(n - 4)]
    return [*prompts, system, prompts[0], [rng.randrange(10, top) for _ in range(3)], [rng.randrange(10, top) for _ in range(33)]]


def one_by_one(model, prompts, settings=SETTINGS):
    "What generate of transformers says to each prompt alone, up to and with the end."
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        new = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)[0, len(prompt) :].tolist()
        end = next((i + 1 for i, token in enumerate(new) if token in settings.eos_token_id), None)
        answers.append(new[:end])
    return answers


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_architecture_answers_as_alone(name):
    model, prompts = made(ARCHITECTURES[name][0]), mixed_prompts()
    expected = one_by_one(model, prompts)
    rng = random.Random(1)
    hoped = [answer if rng.random() < 0.5 else [rng.randrange(64) for _ in range(9)] for answer in expected]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for batch_size in (1, 4, 16):
            assert continuations(model, prompts, SETTINGS, hoped, batch_size) == expected
    assert bool(why_not_in_slots(model, prompts, 12)) == (name in SLOW)
    assert model.config._attn_implementation == "sdpa" or name in SLOW or "gemma2" in name


@pytest.mark.parametrize("seed", range(4))
def test_pieces_and_guesses_change_nothing(seed, monkeypatch):
    monkeypatch.setitem(generation.AT_ONCE, "cpu", 7 + 30 * seed)
    monkeypatch.setitem(generation.SPARE, "cpu", (0, 5, 100, 10_000)[seed])
    model, prompts = made(LlamaConfig(**COMMON), seed), mixed_prompts(14, seed)
    expected = one_by_one(model, prompts)
    for hoped in (None, expected, [[*answer[:3], 5, *answer[3:]] for answer in expected], expected[::-1]):
        assert continuations(model, prompts, SETTINGS, hoped, 3) == expected


def test_what_is_hoped_for_is_computed_in_one_step_and_the_beginning_once():
    model, prompts = made(LlamaConfig(**COMMON)), mixed_prompts()
    expected = one_by_one(model, prompts)

    def effort(hoped):
        writer = _Writer(model, prompts, SETTINGS, hoped, None)
        with torch.no_grad(), generation.attention_of(model, generation.IN_SLOTS):
            generation._write(writer, 4, lambda done: None)
        assert [writer.answers[i] for i in range(len(prompts))] == expected
        return writer

    blind, told = effort(None), effort(expected)
    assert told.steps < blind.steps and told.right > told.guessed / 2
    beginnings = {tuple(prompt[: i + 1]) for prompt in prompts for i in range(len(prompt))}
    wrong = told.guessed - told.right
    again = len(prompts)  # the last token of a prompt is always computed
    assert told.computed <= len(beginnings) + again + sum(map(len, expected)) + wrong


def test_an_adapter_on_and_off_and_low_precision():
    for dtype in (torch.float32, torch.bfloat16):
        base = made(LlamaConfig(**COMMON), dtype=dtype)
        model = get_peft_model(base, LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"])).eval()
        prompts = mixed_prompts()
        assert not why_not_in_slots(model, prompts, 12)
        tuned = continuations(model, prompts, SETTINGS, batch_size=4)
        with model.disable_adapter():
            plain = continuations(model, prompts, SETTINGS, batch_size=4)
        if dtype == torch.float32:
            assert tuned == one_by_one(model, prompts) != plain
            with model.disable_adapter():
                assert plain == one_by_one(model, prompts)
        assert all(1 <= len(answer) <= 12 for answer in tuned + plain)


def test_a_prompt_without_a_token_is_named():
    model = made(ARCHITECTURES["llama"][0])
    with pytest.raises(ConfigError, match="Prompt 2 of 2 has no token"):
        continuations(model, [[5], []], SETTINGS)


def test_it_falls_back_and_says_so_once():
    prompts = mixed_prompts()
    model = made(ARCHITECTURES["bloom"][0])
    with pytest.warns(UserWarning, match="BloomForCausalLM: answers are written by generate of transformers"):
        continuations(model, prompts, SETTINGS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        continuations(model, prompts, SETTINGS)


def long_rope():
    long = {"rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": [1.0] * 4, "long_factor": [8.0] * 4, "original_max_position_embeddings": 32}
    return made(Phi3Config(**COMMON | {"max_position_embeddings": 512}, original_max_position_embeddings=32, rope_parameters=long))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: get_peft_model(made(LlamaConfig(**COMMON)), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)), "adapter changes the prompt"),
        (long_rope, "positions depend on the length"),
        (lambda: T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)), "different parts"),
    ],
)
def test_known_doubts(make, reason):
    assert reason in why_not_in_slots(make(), mixed_prompts(), 12)


def test_what_the_model_asks_of_its_generation_is_done(tiny_model):
    model, prompts = made(LlamaConfig(**COMMON)), mixed_prompts()
    model.generation_config.repetition_penalty = 1.7
    assert "repetition_penalty" in why_not_in_slots(model, prompts, 12)
    with pytest.warns(UserWarning, match="repetition_penalty"):
        assert continuations(model, prompts, SETTINGS, batch_size=1) == one_by_one(model, prompts)


def test_a_model_that_hides_something_is_found_out(monkeypatch):
    "Keys that only a part of the text sees, in a way that no configuration tells."
    model, prompts = made(LlamaConfig(**COMMON)), mixed_prompts()
    forward = model.forward
    model.forward = lambda input_ids, **options: forward(input_ids=input_ids + (input_ids.shape[1] > 40), **options)
    assert why_not_in_slots(model, prompts, 12)


def test_drawn_answers_have_a_seed_and_do_not_depend_on_the_batch():
    model, prompts = made(LlamaConfig(**COMMON)), mixed_prompts()
    warm = Sampling(1.5, 0.9, seed=3)
    one, four = (continuations(model, prompts, SETTINGS, None, n, warm) for n in (1, 4))
    assert one == four != continuations(model, prompts, SETTINGS, None, 4, Sampling(1.5, 0.9, seed=4))
    assert continuations(model, prompts, SETTINGS, None, 4, Sampling(1e-4)) == one_by_one(model, prompts)


@pytest.mark.parametrize("name", ["slots", "transformers"])
def test_drawn_answers_do_not_depend_on_the_other_questions(name):
    "In any order, some of them alone, and a question that is asked twice is answered twice."
    model, prompts = made(LlamaConfig(**COMMON)), mixed_prompts()
    if name == "transformers":
        model.generation_config.repetition_penalty = 1.3
    warm = Sampling(1.5, 0.9, seed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        answers = continuations(model, prompts, SETTINGS, None, 4, warm)
        assert bool(why_not_in_slots(model, prompts, 12)) == (name == "transformers")
        order = [3, 8, 0, 5, 6, 1]  # 6 asks what 0 asks
        assert continuations(model, [prompts[i] for i in order], SETTINGS, None, 2, warm) == [answers[i] for i in order]
        assert prompts[6] == prompts[0] and answers[6] != answers[0] == continuations(model, prompts[:1], SETTINGS, None, 1, warm)[0]
        state = torch.random.get_rng_state()
        assert continuations(model, prompts, SETTINGS, None, 8, warm) == answers != continuations(model, prompts, SETTINGS, None, 8, Sampling(1.5, 0.9, seed=4))
        assert torch.equal(state, torch.random.get_rng_state())


def test_both_ways_of_writing_draw_the_same(monkeypatch):
    model, prompts = made(LlamaConfig(**COMMON)), mixed_prompts()
    expected = continuations(model, prompts, SETTINGS, None, 4, Sampling(1.2, 0.95))
    monkeypatch.setattr(generation, "why_not_in_slots", lambda *args: "for the test")
    with pytest.warns(UserWarning, match="for the test"):
        assert continuations(model, prompts, SETTINGS, None, 4, Sampling(1.2, 0.95)) == expected


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": -1}, {"temperature": float("nan")}, {"temperature": "warm"}, {"temperature": True}, {"top_p": 0}, {"top_p": 1.5}, {"seed": 1.5}, {"seed": None}])
def test_what_can_not_be_drawn_is_said(options):
    with pytest.raises(ConfigError, match="Sampling: expected .*Try temperature=0.7|Sampling: expected a whole number as seed"):
        Sampling(**options)


def test_amounts_are_at_least_one():
    model, prompts = made(LlamaConfig(**COMMON)), mixed_prompts()
    for batch_size in (0, -1, 2.0, None):
        with pytest.raises(ConfigError, match="batch_size="):
            continuations(model, prompts, SETTINGS, batch_size=batch_size)
    for most in (0, -1, "12"):
        with pytest.raises(ConfigError, match="max_new_tokens="):
            greedy(model, None, most)


def test_drawn_tokens_come_as_often_as_they_should():
    logits = torch.tensor([[0.0, 1.0, 2.0, -30.0]]).repeat(20_000, 1)
    drawn = torch.bincount(torch.tensor(Sampling(0.5).draw(logits, torch.Generator().manual_seed(0))), minlength=4) / 20_000
    torch.testing.assert_close(drawn, (logits[0] / 0.5).softmax(-1), rtol=0, atol=0.01)
    assert set(Sampling(1.0, 0.6).draw(logits, torch.Generator().manual_seed(0))) == {2}


def test_with_too_little_memory_fewer_texts_are_written_at_once(monkeypatch):
    model, prompts = made(LlamaConfig(**COMMON)), mixed_prompts()
    expected, feed, sizes = one_by_one(model, prompts), generation._feed, []

    def scarce(model, slots, *step):
        if slots.n > 2 and len(sizes) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        sizes.append(slots.n)
        return feed(model, slots, *step)

    why_not_in_slots(model, prompts, 12)
    monkeypatch.setattr(generation, "_feed", scarce)
    done = []
    assert continuations(model, prompts, SETTINGS, batch_size=8, told=done.append) == expected
    assert set(sizes) == {8, 2} and done == sorted(done) and done[-1] == len(prompts)


def test_an_error_or_a_stop_leaves_the_model_as_it_was():
    model, prompts = made(LlamaConfig(**COMMON)), mixed_prompts()
    model.train()

    def stop(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        continuations(model, prompts, SETTINGS, told=stop)
    assert model.training and inner_model(model).config._attn_implementation == "sdpa"


def test_no_prompts_no_answers():
    assert continuations(made(LlamaConfig(**COMMON)), [], SETTINGS) == []


def test_a_source_prefers_the_place_with_the_most_in_common():
    source = Source("question", [1, 2, 3, 9, *range(20, 34), 5, 3, 8])
    assert source.next([1, 2, 3]) == (9, ("question", 3, True))
    assert source.next([6, 3]) == (8, ("question", 1, False)), "the later one, when nothing else tells"
    assert source.next([2, 6, 3])[0] == 9, "the one beside a word that was said"
    assert source.next([8]) is None and source.next([77]) is None
    source.extend([8, 8])
    assert source.next([3, 8]) == (8, ("question", 1, True)), "no text goes on with the next one"


def test_guesses_get_longer_where_they_are_right():
    guesser, source = Guesser(), Source("hoped", list(range(30)))
    short, seen = guesser.guess([3, 4], [source], 0.5, 15)
    for _ in range(50):
        guesser.learn(guesser.guess([3, 4], [source], 0.5, 15)[1], range(5, 30))
    long, _ = guesser.guess([3, 4], [source], 0.5, 15)
    assert len(short) <= 1 and long == list(range(5, 20))
    for _ in range(500):
        guesser.learn(guesser.guess([3, 4], [source], 0.5, 15)[1], [0] * 16)
    assert guesser.guess([3, 4], [source], 0.5, 15)[0] == []
