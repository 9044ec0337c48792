"""Statistics and continual merging under all names of their configurations, on every kind of pool whose tasks
have logits."""
import errno
import tempfile
from copy import deepcopy

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value

from conftest import perturbed, save_tower, tower_of
from fusionbook.core.errors import FusionError
from fusionbook.data import mini8
from fusionbook.method import RegMean
from fusionbook.method.base import fuse, load_algorithm_from_config
from fusionbook.method.from_statistics.essential import Residual
from fusionbook.method.from_statistics.grams import expert_grams
from fusionbook.method.check import toy_data_pool, ToyPool, ToyTasks
from fusionbook.method.statistics import input_axis
from fusionbook.modelpool import CLIPVisionModelPool
from fusionbook.models.clip import tiny_clip
from fusionbook.models.text import text_encoder, tiny_text
from fusionbook.taskpool import CLIPVisionModelTaskPool, TextClassificationTaskPool

transformers = pytest.importorskip('transformers')
FEW = dict(
    num_regmean_examples=6,
    num_fisher_examples=4,
    max_samples=4,
    proxy_n_samples=6,
    num_samples=6,
    batch_size=3,
    num_steps=2,
    max_steps=2,
    evaluations=2,
)
STATISTICS = (
    'fisher_merging/clip_fisher_merging',
    'fisher_merging/gpt2_fisher_merging',
    'fisher_merging/fisher_merging',
    'regmean/clip_regmean',
    'regmean/gpt2_regmean',
    'regmean/regmean',
    'regmean_plusplus/clip_regmean_plusplus',
    'trust_region/clip_task_arithmetic',
    'esm/esm',
    'ada_svd/clip_vision',
    'activation_informed',
    'evolve',
)
CONTINUAL = (
    'opcm/opcm',
    'opcm/opcm_general',
    'opcm/task_arithmetic',
    'opcm/ties_merging',
    'opcm/weight_average',
    'dop/dop',
    'dop/dop_general',
    'nufilt/nufilt',
    'magmax/continual',
    'magmax/magmax',
)


class Tasks(ToyTasks):
    "Logits of networks of `transformers`."
    def logits(self, task): return lambda model, x: model(x).logits


def moved(network, seed):
    "The same network with other numbers near its own."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters(): p.add_(.05 * torch.randn(p.shape, generator=g))
    return network.eval()


def supervised(make, inputs):
    "A base, two experts, and inputs of two tasks."
    torch.manual_seed(0)
    base = make().eval()
    def copy(seed):
        other = make()
        other.load_state_dict(base.state_dict())
        return moved(other, seed)

    data = {
        k: {t: inputs(i + 10 * j) for j, t in enumerate('ab')}
        for i, k in enumerate(('train_datasets', 'val_datasets', 'test_datasets'))
    }
    tasks = Tasks(data['test_datasets'], labels=lambda x: x.flatten(1).sum(1).long() % 3)
    return ToyPool({'a': copy(1), 'b': copy(2)}, base, **data).attach(tasks)


def gpt2():
    t = transformers
    config = t.GPT2Config(
        vocab_size=40,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=16,
        num_labels=3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    def words(seed): return torch.randint(3, 40, (8, 6), generator=torch.Generator().manual_seed(seed))
    return supervised(lambda: t.GPT2ForSequenceClassification(config), words)


def bert():
    t = transformers
    config = t.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        num_labels=3,
    )
    def words(seed): return torch.randint(3, 40, (8, 6), generator=torch.Generator().manual_seed(seed))
    return supervised(lambda: t.BertForSequenceClassification(config), words)


def resnet():
    t = transformers
    config = t.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type='basic', num_labels=3
    )
    def pictures(seed): return torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return supervised(lambda: t.ResNetForImageClassification(config), pictures)


def convnext():
    "Depthwise convolutions, which are many small matrices."
    t = transformers
    config = t.ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, patch_size=4, num_labels=3)
    def pictures(seed): return torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return supervised(lambda: t.ConvNextForImageClassification(config), pictures)


def clip(folder):
    "Towers of a tiny CLIP, which classify by its text tower."
    names = 'digits', 'shapes'
    def part(kind): return {n: mini8.load(n, kind, size=8) for n in names}
    base = tiny_clip(f'{folder}/base', [c for n in names for c in mini8.TASKS[n]], [mini8.TEMPLATE])
    experts = {
        n: save_tower(perturbed(tower_of(base), i), f'{folder}/{n}', base) for i, n in enumerate(names, 1)
    }
    pool = CLIPVisionModelPool(
        {'_pretrained_': str(base)} | experts, train_datasets=part('train'), val_datasets=part('validation')
    )
    tests = {n: {'dataset': d, 'templates': [mini8.TEMPLATE]} for n, d in part('test').items()}
    return pool.attach(CLIPVisionModelTaskPool(tests, str(base)))


def text(folder):
    "Sentence encoders, classified by the sentences of their classes."
    kinds = Features(text=Value('string'), label=ClassLabel(names=['sports', 'business']))
    rows = Dataset.from_dict(dict(text=[*WORDS, 'sports news'], label=[0, 1, 0, 0]), features=kinds)
    entry = dict(dataset=rows, sentences={'business': 'business news', 'sports': 'sports news'})
    base = tiny_text(f'{folder}/base', WORDS)
    experts = {n: text_encoder(tiny_text(f'{folder}/{n}', WORDS, seed=i)) for i, n in enumerate('ab', 1)}
    data = {k: dict(a=rows, b=rows) for k in ('train_datasets', 'val_datasets')}
    return ToyPool(experts, text_encoder(base), **data).attach(
        TextClassificationTaskPool(dict(a=entry, b=entry), str(base))
    )


WORDS = ['sports news', 'business news', 'the match was won today']
POOLS = dict(
    gpt2=gpt2,
    bert=bert,
    resnet=resnet,
    convnext=convnext,
    clip=lambda: clip(tempfile.mkdtemp()),
    text=lambda: text(tempfile.mkdtemp()),
)
made = {}


def pool_of(kind):
    if kind not in made: made[kind] = POOLS[kind]()
    return made[kind]


def named(name, **more):
    "The method of a configuration, with few inputs and few steps."
    method = load_algorithm_from_config(dict(name=name))
    for key, value in (FEW | more).items():
        if key in method.__dataclass_fields__: setattr(method, key, value)
    return method


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv('FUSIONBOOK_CACHE', str(tmp_path/'cache'))


@pytest.mark.parametrize('kind', POOLS)
@pytest.mark.parametrize('name', STATISTICS + CONTINUAL)
def test_every_name_merges_every_kind_of_pool(kind, name):
    "A network with the base's names, finite numbers, and something of the experts in it."
    pool, kernels = (
        pool_of(kind),
        dict(matrices='linear_and_convolutions') if kind in ('resnet', 'convnext') else {},
    )
    found = fuse(named(name, **kernels), pool)
    steps = found['steps'] if isinstance(found, dict) else [found]
    assert len(steps) == (2 if name in CONTINUAL and name != 'magmax/magmax' else 1)
    base, merged = pool.load_model('_pretrained_').state_dict(), steps[-1].state_dict()
    assert merged.keys() == base.keys()
    assert all(torch.isfinite(v).all() for v in merged.values() if v.is_floating_point())
    assert any(not torch.equal(merged[k], base[k]) for k in base)


def weights(net, expert):
    "The plain network with B_t A_t of one expert added to each layer."
    plain = deepcopy(net.network)
    with torch.no_grad():
        for name, rest in zip(net.layers, net.residuals, strict=True):
            layer, own = plain.get_submodule(name), rest.up[expert] @ rest.down[expert]
            layer.weight += (own if input_axis(layer) else own.T).to(layer.weight)
    return plain


@pytest.mark.parametrize('kind', POOLS)
def test_residual_experts_answer(kind, monkeypatch):
    "Asked for one expert, ESM++ answers as the network with W + B_t A_t does, and not as the merge does."
    pool = pool_of(kind)
    net = fuse(named('esm/esm_plusplus', lora_rank=4), pool)
    assert len(net.layers) > 1 or kind == 'resnet' # all linear layers, GPT-2's Conv1D too
    for i, task in enumerate(pool.model_names):
        head, x = pool.logits(task), pool.inputs(task, 'train')[[0, 1]]
        with torch.no_grad(): free = net.combined_logits(head, x)
        assert torch.isfinite(free).all() and len(free) == 2
        with monkeypatch.context() as m, torch.no_grad():
            m.setattr(Residual, 'route', lambda self, x, i=i: torch.full((len(x),), i))
            forced, plain = net.combined_logits(head, x), head(weights(net, i), x)
        assert torch.allclose(forced, plain, atol=1e-4 * plain.abs().max().item())
        assert not torch.allclose(plain, head(net.network, x), atol=1e-4 * plain.abs().max().item())


@pytest.mark.parametrize('kind', POOLS)
def test_residuals_of_full_rank_are_all_that_an_expert_has_beyond_the_merge(kind):
    "On what its matrices read: (B_t A_t) G_t = (W_t - W) G_t."
    pool, method = pool_of(kind), named('esm/esm_plusplus', lora_rank=10_000)
    net = fuse(method, pool)
    for i, (task, expert) in enumerate(zip(pool.model_names, pool.experts(), strict=True)):
        sums = expert_grams(method, pool, task, samples=method.proxy_n_samples, room_mb=method.gram_mb)
        for name, rest in zip(net.layers, net.residuals, strict=True):
            G, own = (
                sums[f'gram/{name}.weight'].double(),
                net.network.get_submodule(name).weight.detach().double(),
            )
            tau = expert[f'{name}.weight'].double() - own
            wanted = (tau if input_axis(net.network.get_submodule(name)) else tau.T) @ G
            assert wanted.abs().max() > 0
            assert torch.allclose(
                (rest.up[i].double() @ rest.down[i].double()) @ G,
                wanted,
                atol=1e-4 * wanted.abs().max().item(),
            ), name


def test_a_pool_without_data_is_refused():
    bare = ToyPool(
        {n: toy_data_pool().load_model(n) for n in '01'}, toy_data_pool().load_model('_pretrained_')
    )
    for name in STATISTICS:
        with pytest.raises(FusionError, match='expected a task pool'): fuse(named(name), bare)


def test_a_task_without_inputs_is_refused():
    pool = toy_data_pool()
    del pool._train_datasets['1'], pool._val_datasets['1']
    for name in STATISTICS:
        with pytest.raises(FusionError, match='expected (train|validation) inputs of task `1`'):
            fuse(named(name), pool)


def test_too_few_inputs_for_a_regular_gram_matrix_give_finite_weights():
    merged = RegMean(num_regmean_examples=1, reduce_non_diagonal_ratio=1.).run(toy_data_pool()).state_dict()
    assert torch.isfinite(merged['layer.weight']).all()


def test_statistics_of_other_models_or_other_inputs_are_refused(tmp_path):
    pool, folder = toy_data_pool(), str(tmp_path/'sums')
    whole = RegMean(num_regmean_examples=8, share=folder).run(pool).state_dict()
    reading = RegMean(num_regmean_examples=8, statistics=folder)
    for table in ('_train_datasets', '_val_datasets'): setattr(pool, table, {})
    assert torch.equal(reading.run(pool).state_dict()['layer.weight'], whole['layer.weight'])
    with pytest.raises(FusionError, match='expected statistics with model'):
        reading.run(toy_data_pool(seed=5))
    for other in (dict(num_regmean_examples=9), dict(data='validation'), dict(seed=3)):
        with pytest.raises(FusionError, match='expected statistics with'):
            RegMean(**(dict(num_regmean_examples=8, statistics=folder) | other)).run(pool)
    (tmp_path/'sums'/'0.safetensors').write_bytes((tmp_path/'sums'/'1.safetensors').read_bytes())
    with pytest.raises(FusionError, match='expected statistics with task `0`'): reading.run(pool)
    (tmp_path/'sums'/'0.safetensors').unlink()
    with pytest.raises(FusionError, match='got no such file'): reading.run(pool)
    (tmp_path/'sums'/'0.safetensors').write_bytes(b'nothing')
    with pytest.raises(FusionError): reading.run(pool)


def test_a_full_disk_stops_before_the_next_pass(monkeypatch):
    "Where sums have to wait on the disk and it takes no more, nothing goes on as if they were there."
    pool = gpt2()
    def full(*args, **kwargs): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr('fusionbook.core.cached.save', full)
    with pytest.raises(FusionError, match='expected room for Gram matrices of `a`'):
        RegMean(num_regmean_examples=4, gram_mb=0.003).run(pool)
    assert torch.isfinite(
        RegMean(num_regmean_examples=4, gram_mb=100).run(pool).state_dict()['score.weight']
    ).all()


def test_passes_and_one_pass_give_the_same_merge():
    pool = gpt2()
    one, many = (RegMean(num_regmean_examples=4, gram_mb=mb).run(pool).state_dict() for mb in (100, .003))
    assert all(torch.allclose(one[k], many[k], atol=1e-6) for k in one)


def test_an_interrupted_collection_is_collected_again(monkeypatch):
    "What was interrupted leaves no half file behind."
    pool, count = toy_data_pool(), []
    import fusionbook.method.from_statistics.grams as grams
    real = grams.collect
    def stopped(*args, **kwargs):
        count.append(1)
        if len(count) == 2: raise KeyboardInterrupt
        return real(*args, **kwargs)
    monkeypatch.setattr(grams, 'collect', stopped)
    with pytest.raises(KeyboardInterrupt): RegMean(num_regmean_examples=8).run(pool)
    found = RegMean(num_regmean_examples=8).run(pool).state_dict()
    monkeypatch.setattr(grams, 'collect', real)
    monkeypatch.setenv('FUSIONBOOK_CACHE', '')
    assert torch.equal(
        found['layer.weight'],
        RegMean(num_regmean_examples=8).run(toy_data_pool()).state_dict()['layer.weight'],
    )
    assert len(count) == 4


ORDERED = [n for n in STATISTICS if n != 'evolve'] # whose search has an order of its own
ALL = dict(num_regmean_examples=8, num_fisher_examples=8, max_samples=8, proxy_n_samples=8, num_samples=8)


@pytest.mark.parametrize('name', ORDERED)
def test_sums_depend_on_neither_the_order_of_inputs_nor_the_size_of_batches(name):
    "Nor on the number of threads, but for rounding."
    def merge(turned, **more):
        pool = gpt2()
        if turned: pool._train_datasets = {t: x.flip(0) for t, x in pool._train_datasets.items()}
        method = named(name, **ALL, **more)
        if hasattr(method, 'fisher'): method.fisher = 'expected' # labels that are drawn belong to the order
        return fuse(method, pool).state_dict()
    before, wanted = torch.get_num_threads(), merge(False)
    try:
        torch.set_num_threads(2)
        others = [merge(True), merge(False, batch_size=8), merge(True, batch_size=1)]
    finally: torch.set_num_threads(before)
    for found in others:
        for k, v in wanted.items():
            assert torch.allclose(found[k], v, atol=2e-4 * v.abs().max().clamp(min=1e-3).item()), k
