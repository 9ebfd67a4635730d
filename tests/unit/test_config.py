"""Each rule of the configuration, every file of conf/, and what Hydra may be told."""

import ast
import dataclasses
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import tiny_hf
from omegaconf import OmegaConf

import nemo_tsdkd
from nemo_tsdkd.checkpoints.shape import QWEN2_5
from nemo_tsdkd.checks.setup import check_model_fits, check_setup
from nemo_tsdkd.config.compose import CONF, compose_config
from nemo_tsdkd.config.schema import ParallelConfig
from nemo_tsdkd.config.train_config import TrainConfig
from nemo_tsdkd.config.validation import UserError

PATHS = ("run_dir=run", "student.path=student", "teacher.path=teacher", "data.path=data.jsonl")
GROUPS = [f.name for f in dataclasses.fields(TrainConfig) if dataclasses.is_dataclass(f.default_factory)]


@cache
def base():
    return compose_config("tiny", PATHS)


def tiny(*changes):
    """The tiny configuration with fields set by their dotted names (as Hydra would, but faster)."""
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(base()), OmegaConf.from_dotlist(list(changes))))


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_every_configuration_composes_and_is_valid(name):
    config = compose_config(name, PATHS)
    config.validate()
    assert isinstance(config, TrainConfig)


@pytest.mark.parametrize("path", sorted(p for g in GROUPS for p in (CONF / g).glob("*.yaml")), ids=lambda p: p.stem)
def test_every_group_file_composes_and_sets_its_fields(path):
    group = path.parent.name
    config = compose_config("tiny", [*PATHS, f"{group}={path.stem}"])
    config.validate()
    for key, value in OmegaConf.load(path).items():
        assert getattr(getattr(config, group), key) == value


def test_every_field_is_read_somewhere():
    """In a module that also names its section, by attribute or by class."""

    def names(node, section):
        for f in dataclasses.fields(node):
            value = getattr(node, f.name)
            yield from names(value, f.name) if dataclasses.is_dataclass(value) else [(section, f.name)]

    declared = ("schema.py", "train_config.py")
    package = [path for path in Path(nemo_tsdkd.__file__).parent.rglob("*.py") if path.name not in declared]
    nodes = [list(ast.walk(ast.parse(path.read_text()))) for path in package]
    read = [{n.attr for n in module if isinstance(n, ast.Attribute)} for module in nodes]
    named = [{n.id for n in module if isinstance(n, ast.Name)} for module in nodes]
    unread = [
        f"{section}.{field}"
        for section, field in names(TrainConfig(), "config")
        if not any(
            field in attributes and {section, f"{section.title()}Config"} & (attributes | classes)
            for attributes, classes in zip(read, named, strict=True)
        )
    ]
    assert unread == []


def test_no_yaml_file_escapes_the_tests():
    known = {*CONF.glob("*.yaml"), *(p for g in GROUPS for p in (CONF / g).glob("*.yaml"))}
    others = set(CONF.rglob("*.yaml")) - known
    # Read by other commands: parsed here, used in their tests.
    assert {path.parent.name for path in others} == {"evaluate", "hardware"}
    assert all(OmegaConf.load(path) for path in others)


def test_overrides_and_groups():
    config = compose_config("demo", [*PATHS, "objective=gkd", "objective.beta=0.25", "data.limit=5", "rollout.lmbda=1"])
    assert (config.objective.preset, config.objective.beta, config.data.limit) == ("gkd", 0.25, 5)
    assert config.rollout.lmbda == 1.0 and config.parallel.world_size == 4
    config.validate()  # what the demo sets of the objective does not stand in a preset's way


def test_a_preset_s_fields_are_shown_and_recorded_as_the_loss_takes_them():
    objective = compose_config("tiny", [*PATHS, "objective=reverse_kl"]).objective
    assert (objective.beta, objective.indirect_kd_alpha, objective.gate_rule) == (1.0, 0.0, "identity")
    with pytest.raises(ValueError, match=r"objective.beta = 0.9: objective.preset = reverse_kl sets it to 1.0"):
        compose_config("tiny", [*PATHS, "objective=reverse_kl", "objective.beta=0.9"])  # the default, but asked for


def test_a_folder_of_ones_own_builds_on_conf(tmp_path):
    (tmp_path / "mine.yaml").write_text("defaults: [tiny, {override objective: gkd}, _self_]\nseed: 7\n")
    config = compose_config("mine", PATHS, tmp_path)
    assert (config.seed, config.objective.preset, config.max_steps) == (7, "gkd", tiny().max_steps)
    with pytest.raises(ValueError, match="no such folder"):
        compose_config("mine", PATHS, tmp_path / "missing")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.betta=1", "'betta' not in 'ObjectiveConfig' at objective.betta"),
        ("+objective.betta=1", "'betta' not in 'ObjectiveConfig' at objective.betta"),
        ("+_target_=os.system", "'_target_' not in 'TrainConfig' at _target_"),
        ("+objective._target_=os.system", "'_target_' not in 'ObjectiveConfig' at objective._target_"),
        ("objective.beta=high", "'high' .* could not be converted to Float at objective.beta"),
        ("max_steps=1.5", "'1.5' .* could not be converted to Integer at max_steps"),
        ("objective.beta=null", "'objective.beta' is not Optional"),
        ("objective=nope", "Could not find 'objective/nope' Available options in 'objective': .* gkd"),
        ("seed", "Error parsing override 'seed'"),
        ("run_dir=${oc.env:UNSET_IN_TESTS}", "'UNSET_IN_TESTS' not found\" at run_dir"),
        ("seed=1,2", "Ambiguous value for argument 'seed=1,2'"),
    ],
)
def test_what_hydra_refuses_is_one_error_that_names_it(override, message):
    with pytest.raises(ValueError, match=f"configuration 'tiny': .*{message}"):
        compose_config("tiny", [*PATHS, override])


@pytest.mark.parametrize("key", ["_target_", "_partial_", "_convert_"])
def test_no_file_can_name_code(tmp_path, key):
    (tmp_path / "bad.yaml").write_text(f"defaults: [tiny, _self_]\nstudent:\n  {key}: os.system\n")
    with pytest.raises(ValueError, match=f"'{key}' not in 'ModelConfig' at student.{key}"):
        compose_config("bad", PATHS, tmp_path)


def test_a_file_that_is_not_yaml_is_named(tmp_path):
    (tmp_path / "bad.yaml").write_text("student: [\n")
    with pytest.raises(ValueError, match=r"configuration 'bad': .*bad.yaml.*, line 2"):
        compose_config("bad", PATHS, tmp_path)


def test_open_fields_are_named():
    with pytest.raises(ValueError, match=r"'tiny' leaves open: data.path, run_dir, teacher.path"):
        compose_config("tiny", ["student.path=s"])
    with pytest.raises(ValueError, match=r"run_dir, student.path, teacher.path, data.path = '\?\?\?': must be set"):
        TrainConfig().validate()


def test_ranks_that_share_no_batch_may_be_any_number():
    config = compose_config("demo", [*PATHS, "parallel.num_nodes=3", "global_batch_size=8"])
    config.validate(batch=False)
    with pytest.raises(ValueError, match="global_batch_size = 8: must be a multiple"):
        config.validate()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("max_steps=0", "max_steps = 0: must be greater than 0"),
        ("micro_batch_size=-1", "micro_batch_size = -1: must be greater"),
        ("micro_batch_tokens=-1", "micro_batch_tokens = -1: must not be negative"),
        (
            "micro_batch_tokens=64",
            "micro_batch_size = 2: micro_batch_tokens = 64 decides .* Set micro_batch_size=1, which",
        ),
        (
            "micro_batch_tokens=63 micro_batch_size=1",
            "micro_batch_tokens = 63: must hold a sequence of data.seq_length = 64 tokens",
        ),
        ("parallel.recompute=some", "parallel.recompute = 'some': must be one of none, selective, full"),
        ("seed=-1", "seed = -1: must not be negative"),
        ("objective.preset=best", "objective.preset = 'best': must be one of paper, reference"),
        ("objective.compile=always", "objective.compile = 'always': must be one of auto, off"),
        ("objective.head=dense", "objective.head = 'dense': must be one of logits, fused"),
        ("objective.beta=1.01", r"objective.beta = 1.01: must lie in \[0, 1\]"),
        ("objective.beta=.nan", "objective.beta = nan: must be a finite number"),
        ("objective.beta=1e-8", "objective.beta = 1e-08: so near to 0 .* Use 0"),
        ("objective.beta=0.99999999", "objective.beta = 0.99999999: so near .* Use 1"),
        ("objective.threshold=-0.1", "objective.threshold = -0.1"),
        ("objective.entropy_fraction=2", "objective.entropy_fraction = 2.0"),
        ("objective.top_k=0", "objective.top_k = 0"),
        ("objective.temperature=0", "objective.temperature = 0.0"),
        ("objective.gate_temperature=0", "objective.gate_temperature = 0.0"),
        ("objective.entropy_weight=-1", "objective.entropy_weight = -1.0"),
        ("teacher.micro_batch_size=0", "teacher.micro_batch_size = 0"),
        ("data.seq_length=1", "data.seq_length = 1"),
        ("data.limit=0", "data.limit = 0"),
        ("rollout.lmbda=1.5", "rollout.lmbda = 1.5"),
        ("rollout.top_p=0", "rollout.top_p = 0.0: must be greater"),
        ("rollout.top_k=-1", "rollout.top_k = -1"),
        ("rollout.temperature=-1", "rollout.temperature = -1.0"),
        ("rollout.reuse=0", "rollout.reuse = 0"),
        ("rollout.sync_every=0", "rollout.sync_every = 0"),
        ("rollout.horizon=step", "rollout.horizon = 'step': must be one of constant, linear, cosine"),
        ("rollout.horizon_from=4", "rollout.horizon_from = 4: rollout.horizon = constant has none"),
        ("rollout.horizon=linear rollout.horizon_from=-4", "rollout.horizon_from = -4: must not be negative"),
        (
            "rollout.horizon=linear rollout.horizon_from=17",
            "rollout.horizon_from = 17: must not exceed rollout.max_new_tokens = 16",
        ),
        (
            "rollout.horizon=cosine rollout.horizon_from=4 rollout.lmbda=0",
            "rollout.horizon = 'cosine': rollout.lmbda = 0 generates nothing",
        ),
        ("rollout.cuda_graphs=on", "rollout.cuda_graphs = "),
        ("rollout.max_new_tokens=64", "rollout.max_new_tokens = 64: must be fewer than data.seq_length = 64"),
        ("optim.lr=0", "optim.lr = 0.0"),
        ("optim.min_lr=1", "optim.min_lr = 1.0: must not exceed optim.lr = 0.001"),
        ("optim.warmup_steps=3", "optim.warmup_steps = 3: must be fewer than max_steps = 3"),
        ("optim.adam_beta1=1", "optim.adam_beta1 = 1.0"),
        ("checkpoint.every_n_steps=50 checkpoint.keep_every=70", "checkpoint.keep_every = 70: .* Use 100"),
        ("teacher.micro_batch_size=9", "teacher.micro_batch_size = 9: must not exceed micro_batch_size"),
        (
            "objective.preset=forward_kl objective.beta=0.3",
            "objective.beta = 0.3: objective.preset = forward_kl sets it",
        ),
        (
            "objective.preset=gkd objective.entropy_weight=2",
            "objective.entropy_weight = 2.0: objective.preset = gkd sets",
        ),
        (
            "objective.preset=reference objective.entropy_fraction=0.2",
            "objective.entropy_fraction = 0.2: .* = reference",
        ),
        (
            "checkpoint.async_save=true teacher.offload_hidden_states=true",
            "checkpoint.async_save = True: teacher.offload_hidden_states pins",
        ),
        ("checkpoint.every_n_steps=0", "checkpoint.every_n_steps = 0"),
        ("checkpoint.every_minutes=0", "checkpoint.every_minutes = 0"),
        ("checkpoint.keep_every=-1", "checkpoint.keep_every = -1"),
        ("parallel.context_parallel_size=0", "parallel.context_parallel_size = 0"),
        ("parallel.sequence_parallel=true", "sequence_parallel = True: needs parallel.tensor_model_parallel_size > 1"),
        (
            "parallel.tensor_model_parallel_size=2",
            "gpus_per_node = 1: must be a multiple of parallel's TP x PP x CP = 2",
        ),
        ("parallel.gpus_per_node=3", "global_batch_size = 4: must be a multiple of .* = 2 x 3 = 6. Use 6."),
    ],
)
def test_each_rule_names_its_field_and_value(overrides, message):
    tiny().validate()
    with pytest.raises(ValueError, match=message):
        tiny(*overrides.split()).validate()


EXPERTS = "expert_model_parallel_size"
NODES = ("parallel.num_nodes=4", "parallel.gpus_per_node=2", "global_batch_size=16")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("teacher.nodes=4", "teacher.nodes = 4: must leave a node of parallel.num_nodes = 4"),
        ("teacher.nodes=-1", "teacher.nodes = -1: must not be negative"),
        (
            "teacher.parallel.tensor_model_parallel_size=0",
            "teacher.parallel.tensor_model_parallel_size = 0: must be gr",
        ),
        ("teacher.parallel.context_parallel_size=-2", "teacher.parallel.context_parallel_size = -2: must be greater"),
        (
            "teacher.parallel.tensor_model_parallel_size=3",
            "parallel.gpus_per_node = 8: must be a multiple of teacher.parallel's TP x PP x CP = 3",
        ),
        (
            "teacher.nodes=1 teacher.parallel.pipeline_model_parallel_size=4",
            "teacher.nodes x parallel.gpus_per_node = 2: must be a multiple of teacher.parallel's TP x PP x CP = 4",
        ),
        (
            "teacher.nodes=1 parallel.tensor_model_parallel_size=4 teacher.parallel.tensor_model_parallel_size=1",
            r"\(parallel.num_nodes - teacher.nodes\) x parallel.gpus_per_node = 6: must be a multiple of parallel's",
        ),
        ("teacher.nodes=1", "global_batch_size = 16: must be a multiple of micro_batch_size x DP = 2 x 6 = 12"),
        (
            "teacher.parallel.sequence_parallel=true",
            "teacher.parallel.sequence_parallel = True: needs teacher.parallel.tensor_model_parallel_size > 1",
        ),
        (
            "teacher.micro_batch_size=3",
            "teacher.micro_batch_size = 3: must not exceed micro_batch_size = 2: in one layout",
        ),
        (
            "teacher.parallel.expert_model_parallel_size=3",
            "teacher.parallel.expert_model_parallel_size = 3: must divide the 8 ranks of a pipeline stage",
        ),
        (
            "teacher.parallel.expert_model_parallel_size=8 teacher.parallel.pipeline_model_parallel_size=2",
            "teacher.parallel.expert_model_parallel_size = 8: must divide the 4 ranks of a pipeline stage",
        ),
        (
            "teacher.parallel.expert_model_parallel_size=0",
            "teacher.parallel.expert_model_parallel_size = 0: must be greater",
        ),
    ],
)
def test_each_rule_of_two_layouts_names_its_field_and_value(overrides, message):
    tiny(*NODES).validate()
    with pytest.raises(UserError, match=message) as error:
        tiny(*NODES, *overrides.split()).validate()
    assert str(error.value).count("\n") <= 2


def test_the_teachers_layout_is_the_students_where_it_is_left_open():
    config = tiny(*NODES, "parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true")
    assert config.one_layout and vars(config.teacher_parallel) == {**vars(config.parallel), EXPERTS: 1}
    config.teacher.parallel.expert_model_parallel_size = 4  # hidden states stay where they are
    config.validate()
    assert config.one_layout and vars(config.teacher_parallel) == {**vars(config.parallel), EXPERTS: 4}
    config.teacher.parallel.tensor_model_parallel_size = 1  # with it, sequence parallelism has no meaning
    config.validate()
    assert not config.one_layout and not config.teacher_parallel.sequence_parallel
    config.teacher.micro_batch_size = 3  # the teacher cuts its rows for itself
    config.teacher.nodes = 2
    config.global_batch_size = 8
    config.validate()
    assert (config.student_world_size, config.teacher_world_size, config.data_parallel_size) == (4, 4, 2)


def test_a_token_budget_leaves_the_rows_of_both_models_open():
    """1 is how a configuration takes back the micro_batch_size of the one that it builds on, as the message says."""
    tiny("micro_batch_tokens=64", "micro_batch_size=1", "teacher.micro_batch_size=3").validate()
    tiny("micro_batch_tokens=0").validate()


def test_off_policy_needs_no_room_for_new_tokens():
    tiny("rollout.max_new_tokens=64", "rollout.lmbda=0").validate()


def test_top_k_above_the_vocabulary():
    objective = tiny("objective.top_k=101").objective
    objective.validate_vocabulary(101)
    with pytest.raises(ValueError, match=r"objective.top_k = 101: must not exceed the vocabulary \(100 tokens\)"):
        objective.validate_vocabulary(100)


@pytest.mark.parametrize(
    ("layout", "want"),
    [
        ({}, 1),
        ({"tensor_model_parallel_size": 4}, 1),
        ({"tensor_model_parallel_size": 4, "sequence_parallel": True}, 4),
        ({"context_parallel_size": 2}, 4),
        ({"tensor_model_parallel_size": 2, "sequence_parallel": True, "context_parallel_size": 2}, 8),
    ],
)
def test_pad_to_multiple(layout, want):
    assert ParallelConfig(**layout).pad_to_multiple == want


def test_sizes_of_a_cluster():
    parallel = ParallelConfig(
        tensor_model_parallel_size=4, pipeline_model_parallel_size=2, num_nodes=4, gpus_per_node=8
    )
    config = replace(tiny(), parallel=parallel)
    assert (config.parallel.world_size, config.parallel.model_parallel_size, config.data_parallel_size) == (32, 8, 4)


@pytest.mark.parametrize(
    ("tp", "pp", "change", "message"),
    [
        (2, 4, {}, None),
        (4, 1, {}, "tensor_model_parallel_size = 4: must divide the student's num_key_value_heads = 2"),
        (8, 1, {}, "tensor_model_parallel_size = 8: must divide the student's num_attention_heads = 12"),
        (2, 1, {"ffn": 8961}, "must divide the student's intermediate_size = 8961"),
        (1, 8, {}, "pipeline_model_parallel_size = 8: must divide the student's num_hidden_layers = 28"),
    ],
)
def test_a_model_must_be_cut_into_equal_parts(tp, pp, change, message):
    parallel = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    shape = replace(QWEN2_5["1.5B"], **change)
    if message is None:
        check_model_fits(shape, parallel, "student")
    else:
        with pytest.raises(ValueError, match=message):
            check_model_fits(shape, parallel, "student")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    tiny_hf.save_hf(folder / "student", num_hidden_layers=2)
    tiny_hf.save_hf(folder / "teacher", num_hidden_layers=4, vocab_size=512)
    (folder / "data.jsonl").touch()
    return [f"student.path={folder}/student", f"teacher.path={folder}/teacher", f"data.path={folder}/data.jsonl"]


@pytest.fixture(scope="module")
def experts(pair, tmp_path_factory):
    """A config.json alone is all that these checks read of a teacher, beside its weights' names."""
    folder = tmp_path_factory.mktemp("experts")
    sizes = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
    return str(tiny_hf.save_hf(folder / "teacher", "qwen3_moe", **sizes))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("student.path={experts}", r"student.path = '\S+': a mixture of 6 experts; only the teacher may be one"),
        (f"parallel.gpus_per_node=2 teacher.parallel.{EXPERTS}=2", f"{EXPERTS} = 2: the teacher is dense"),
        (
            f"teacher.path={{experts}} parallel.gpus_per_node=4 teacher.parallel.{EXPERTS}=4 global_batch_size=8",
            f"{EXPERTS} = 4: must divide the teacher's 6 experts",
        ),
        (
            "teacher.path={experts} teacher.precision=fp8_tensorwise teacher.micro_batch_size=1",
            "FP8 needs dimensions that are multiples of 16, but the expert's width is 40",
        ),
    ],
)
def test_what_only_a_teacher_with_experts_may_have(overrides, message, pair, experts):
    config = tiny(*pair, *overrides.format(experts=experts).split())
    with pytest.raises(UserError, match=message) as error:
        check_setup(config)
    assert str(error.value).count("\n") <= 2


def test_check_setup_accepts_a_teacher_with_experts(pair, experts):
    ranks = ("parallel.gpus_per_node=3", f"teacher.parallel.{EXPERTS}=3", "global_batch_size=6")
    shape = check_setup(tiny(*pair, f"teacher.path={experts}", *ranks))["teacher"]
    assert (shape.experts, shape.experts_per_token, shape.expert_ffn) == (6, 2, 40)


def test_check_setup_reads_both_models(pair):
    shapes = check_setup(tiny(*pair))
    assert [(shapes[which].layers, shapes[which].vocab) for which in ("student", "teacher")] == [(2, 330), (4, 512)]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("teacher.path=/nowhere", "teacher.path = '/nowhere': no such folder"),
        ("objective.top_k=331", r"objective.top_k = 331: must not exceed the vocabulary \(330 tokens\)"),
        ("parallel.pipeline_model_parallel_size=4 parallel.gpus_per_node=4", "student's num_hidden_layers = 2"),
        ("parallel.tensor_model_parallel_size=4 parallel.gpus_per_node=4", "student's num_key_value_heads = 2"),
        ("data.path=/nowhere/d.jsonl", "data.path = '/nowhere/d.jsonl': there is no such file"),
        ("data.path=/nowhere", "data.path = '/nowhere': there is no such file"),
        ("data.path=/tmp data.split=test", "data.split = 'test': only a hub data set has one"),
        ("precision.name=fp8", "precision.name = 'fp8'"),
        ("objective.gate_rule=sharp", "objective.gate_rule = 'sharp': must be one of"),
        ("teacher.precision=fp8_delayed", "teacher.precision = 'fp8_delayed': delayed scaling is not offered"),
        ("precision.name=fp8_tensorwise data.seq_length=68 micro_batch_size=1", "data.seq_length = 68"),
    ],
)
def test_check_setup_finds_what_cannot_run(pair, overrides, message):
    with pytest.raises(ValueError, match=message):
        check_setup(tiny(*pair, *overrides.split()))


def test_a_pickled_checkpoint_is_refused(tmp_path, pair):
    student = Path(pair[0].split("=")[1])
    (tmp_path / "config.json").write_bytes((student / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match="its weights are a pickle"):
        check_setup(tiny(*pair, f"student.path={tmp_path}"))
