"""The demo's parts: problems that are apart, steps that are right, models as their recipes say, a cache that keeps."""

from dataclasses import replace

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_tsdkd.config.compose import compose_config
from nemo_tsdkd.data.held_out import load_held_out
from nemo_tsdkd.demo import pretrain, run, score, tasks
from nemo_tsdkd.demo.tasks import is_solved, written_steps
from nemo_tsdkd.verifiers.judge import judge_all

TINY = replace(pretrain.RECIPES["student"], hidden_size=32, written_share=1.0, steps=2)


@pytest.fixture(scope="module")
def tokenizer():
    return tasks.build_tokenizer()


@pytest.mark.parametrize("seed", [tasks.PRETRAIN_SEED, tasks.DISTIL_SEED])
def test_no_training_problem_is_held_out(seed):
    held_out = {p["question"] for p in tasks.held_out_problems()}
    training = [p["question"] for p in tasks.training_problems(5000, seed)]
    assert len(held_out) == tasks.HELD_OUT and len(training) == 5000
    assert not held_out & set(training)


@pytest.mark.parametrize("count", [0, tasks.HELD_OUT + 1])
def test_only_held_out_problems_can_be_scored(count):
    with pytest.raises(ValueError, match="--problems = "):
        tasks.held_out_problems(count)


def test_written_steps_are_right_and_verified():
    for problem in tasks.held_out_problems():
        *lines, last = written_steps(problem).splitlines()
        assert is_solved(problem, "\n".join([*lines, last]))
        for line, following in zip(lines, [*lines[1:], last.replace("Answer:", "")], strict=True):
            left, operator, right, result = line.replace("=", "").split()
            assert int(left) + int(operator + right) == int(result) == int(following.split()[0])


def test_the_loop_scores_the_same_problems_by_the_same_limit_with_the_same_verdicts(tmp_path):
    problems = tasks.held_out_problems(40)
    data = run.write_held_out(tmp_path / "held_out.jsonl", problems)
    required = [f"{name}=unused" for name in ("run_dir", "student.path", "teacher.path", "data.path")]
    config = compose_config("demo", [*required, f"validation.path={data}"])
    assert config.validation.max_new_tokens == score.MAX_NEW_TOKENS and config.validation.temperature == 0
    tokenizer = tasks.build_tokenizer()
    held_out = load_held_out(config, tokenizer)
    longest = max(len(problem.prompt_ids) for problem in held_out)
    assert longest + score.MAX_NEW_TOKENS <= config.data.seq_length  # no response meets another limit
    texts = [tokenizer.decode(problem.prompt_ids) for problem in held_out]
    assert all(problem["question"] in text for problem, text in zip(problems, texts, strict=True))
    wrong = [f"Answer: {int(problem['answer']) + 1}" for problem in problems]
    right = [f"Answer: {problem['answer']}" for problem in problems]
    odd = [
        "",
        "19",
        "Answer: 5 or 6",
        "Answer:\n",
        f"{right[4]}.",
        f"{wrong[5]}\n{right[5]}",
        f"{right[6]} \n\nThat is all",
    ]
    for responses in (right, wrong, [*odd, *right[len(odd) :]]):
        verdicts = judge_all("reasoning_gym", responses, [problem.reference for problem in held_out])
        assert [v.correct for v in verdicts] == [*map(is_solved, problems, responses)]


def test_an_estimate_is_near_and_seldom_right():
    problems = tasks.held_out_problems()
    for problem in problems:
        estimate = int(tasks.estimate(problem).removeprefix("Answer: "))
        assert estimate % 5 == 0 and abs(estimate - int(problem["answer"])) <= 2
        assert is_solved(problem, tasks.estimate(problem)) == (int(problem["answer"]) % 5 == 0)
    assert sum(is_solved(problem, tasks.estimate(problem)) for problem in problems) < 0.3 * len(problems)


def test_a_wrong_missing_or_early_answer_is_not_a_solution():
    problem = tasks.held_out_problems(1)[0]
    right, wrong = problem["answer"], int(problem["answer"]) + 1
    assert is_solved(problem, f"Answer: {wrong}\nAnswer: {right}")
    for response in ("", right, f"Answer: {wrong}", f"Answer: {right}\nAnswer: {wrong}", f"Answer: {right} or {wrong}"):
        assert not is_solved(problem, response)


def test_the_tokenizer_is_lossless_and_leaves_padding_to_test(tokenizer):
    for problem in tasks.held_out_problems(50):
        for text in (problem["question"], written_steps(problem)):
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "1 + 2"}], add_generation_prompt=True)
    assert tokenizer.decode(chat) == "<|im_start|>user\n1 + 2<|im_end|>\n<|im_start|>assistant\n"
    widths = {len(tokenizer), *(recipe.vocab_size for recipe in pretrain.RECIPES.values())}
    assert len(widths) == 3 and all(width % 1024 for width in widths)  # 1024: what training pads to


def test_models_match_their_recipes_and_are_trained_once(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "PROBLEMS", 64)
    recipes = {"teacher": replace(TINY, tie_word_embeddings=False, vocab_size=120), "student": TINY}
    folders = pretrain.pretrained(tmp_path, recipes)
    for name, recipe in recipes.items():
        assert not list(folders[name].glob("*.bin"))
        model = AutoModelForCausalLM.from_pretrained(folders[name])
        tied = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
        assert (tied, model.config.vocab_size) == (recipe.tie_word_embeddings, recipe.vocab_size)
        tokenizer = AutoTokenizer.from_pretrained(folders[name])
        assert tokenizer.chat_template == tasks.CHAT_TEMPLATE
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert pretrain.pretrained(tmp_path, recipes) == folders
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == written
    longer = pretrain.pretrained(tmp_path, {"student": replace(TINY, steps=3)})
    assert longer["student"] != folders["student"]


def test_a_training_that_breaks_off_leaves_no_model(tmp_path, monkeypatch):
    def broken(recipe, problems, folder):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, "train", broken)
    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrained(tmp_path, {"student": TINY})
    assert list(tmp_path.iterdir()) == []


def test_accuracy_counts_what_the_verifier_accepts(tmp_path):
    known = tasks.training_problems(6, tasks.PRETRAIN_SEED)
    pretrain.train(replace(TINY, hidden_size=64, steps=200), known, tmp_path)  # enough to know six problems by heart
    false = [{**problem, "answer": str(int(problem["answer"]) + 1)} for problem in known[:3]]
    assert score.accuracy(tmp_path, known) == 1.0
    assert score.accuracy(tmp_path, [*known[3:], *false]) == 0.5


@pytest.mark.parametrize("verbose", [False, True])
def test_verbose_brings_back_what_libraries_print_in_every_command(verbose, tmp_path, monkeypatch):
    started = []

    def start(command, env, check):
        started.append((command, env.get("PYTHONWARNINGS")))
        if "export" in command:
            raise InterruptedError  # there is nothing to score

    monkeypatch.delenv("PYTHONWARNINGS", raising=False)
    monkeypatch.setattr(run.subprocess, "run", start)
    monkeypatch.setattr(run, "pretrained", lambda cache: {"student": tmp_path, "teacher": tmp_path})
    monkeypatch.setattr(run, "PROMPTS", 4)
    with pytest.raises(InterruptedError):
        run.main(["--runs", str(tmp_path), "--problems", "4", *(["--verbose"] if verbose else [])])
    assert len(started) == 2
    for (command, warnings), name in zip(started, ("train", "export"), strict=True):
        before = command[command.index("nemo_tsdkd") + 1 : command.index(name)]
        assert (before, warnings) == ((["--verbose"], None) if verbose else ([], "ignore"))
