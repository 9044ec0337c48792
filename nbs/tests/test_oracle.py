"""Every stored case of FusionBench, mergekit and PEFT, by the names and settings of those tools, within the
tolerance that is stored with it.

What a case's own tool cannot do, we can; what is no single merge (masks drawn at random, parts, given
statistics) is compared on the page that is named, and a case that neither this file nor a page knows fails.
"""
import json
from functools import cache
from pathlib import Path

import pytest
import torch

import fusionbook.method as methods
from fusionbook.bench.merge_methods import way_of
from fusionbook.core.checkpoint import Checkpoint
from fusionbook.core.errors import FusionError
from fusionbook.core.oracle import oracle_folder
from fusionbook.method.base import fuse, load_algorithm_from_config
from fusionbook.method.check import ToyPool, agree, oracle_cases

ROOT, PAGES = oracle_folder('merge'), Path(__file__).parents[1]
if ROOT is None: pytest.skip('no stored outputs of other tools', allow_module_level=True)
CASES = {c['case']: c for c in json.loads((ROOT/'cases.json').read_text())}
# names of functions of FusionBench whose configuration has another name
RENAMED = dict(
    task_singular_vector='task_singular_vector/TaskSingularVectorMerging',
    wudi='wudi/wudi',
    magmax='magmax/magmax',
    slerp='slerp/slerp',
    model_stock='model_stock/model_stock',
    iso_c='isotropic_merging/iso_c',
    iso_cts='isotropic_merging/iso_cts',
    linear_interpolation='linear/linear_interpolation',
)
MERGED_BEFORE = {
    'outputs/fusion_bench/task_arithmetic_0.3.safetensors': dict(name='task_arithmetic', scaling_factor=0.3),
    'outputs/fusion_bench/simple_average.safetensors': dict(name='simple_average'),
}
# single merges; where a tool rounds to bfloat16 at every step (`informational`), the share and the size of
# what differs is stored beside it
MERGES = {
    n
    for n, c in CASES.items()
    if c['status'] == 'ok'
    and c['comparison'] in ('elementwise', 'informational')
    and c['output_kind'] in ('merged_state_dict', 'merged_task_vector')
    and not c['method'].startswith(('fisher', 'regmean'))
}
# entries that differ: of a tensor too small for the density PEFT keeps none, which leaves it the base's;
# here one
OTHERWISE = {'peft/ties_d0.001': 24}
TIED = 'peft/bf16_ties_d0.5_total', # many equal magnitudes at the threshold, of which one tool keeps others
REFUSED = {  # what is no merge here either, and what is said
    'mergekit/della_bad_epsilon': 'expected `density` ± `epsilon` within',
    'mergekit/task_arithmetic_noweight': '`weight`',
    'mergekit/model_stock_1expert': 'two experts at least',
}
ELSEWHERE = CASES.keys() - MERGES - {n for n, c in CASES.items() if c['status'] == 'failed'}


def of_fusion_bench(p, method):
    "FusionBench's method with its settings."
    known = {
        k: v
        for k, v in p.items()
        if k not in ('optimizer', 'inputs_cast_to', 'output_cast_to', 'int64_buffer', 'merged')
    }
    name = RENAMED.get(method, method)
    if method == 'singular_value_calibration':
        name, known['base_method'] = f'{method}/simple_average', MERGED_BEFORE[p['merged']]
    if method == 'model_stock': known['ignore_keys'] = []
    return load_algorithm_from_config(dict(known, name=name))


def of_mergekit(p, method, count):
    "mergekit's method as its files are read."
    way, whole = way_of(method, foreign=True), {}
    def values(key, default):
        found = p.get(key, default)
        if found is ...: raise FusionError(f'expected `{key}` for `{method}`, got none')
        return found
    each = {k: v if isinstance(v := values(k, d), list) else [v] * count for k, d in way.each.items()}
    whole = {k: values(k, d) for k, d in way.whole.items()}
    return getattr(methods, way.target)(**way.fields(each, whole))


def of_peft(p, method):
    "PEFT's ways of putting adapters together, on task vectors."
    plain = dict(scaling_factor=1., weights=p['weights'])
    if method == 'task_arithmetic': return methods.TaskArithmetic(**plain)
    if method == 'magnitude_prune':
        return methods.MagnitudeDiffPruning(
            1 - p['density'], extract_names=[''], pattern='tensor', weights=p['weights']
        )
    elect = 'count' if p.get('majority_sign_method') == 'frequency' else 'sum'
    return methods.TiesMerging(
        threshold=p['density'], merge_func='mean', trim='tensor', tie='plus', elect=elect, **plain
    )


def method_of(case, pool):
    make = dict(fusion_bench=of_fusion_bench, peft=of_peft).get(case['implementation'])
    return (
        make(case['params'], case['method'])
        if make
        else of_mergekit(case['params'], case['method'], len(pool))
    )


def with_buffers(pool, buffers):
    "An integer in every model, as the case says."
    if buffers is None: return pool
    values = [buffers['base'], *buffers['experts']] if isinstance(buffers, dict) else buffers
    names = pool.all_model_names
    models = {
        n: dict(pool._models[n], num_batches=torch.tensor(v)) for n, v in zip(names, values, strict=True)
    }
    return ToyPool({n: m for n, m in models.items() if n != '_pretrained_'}, models.get('_pretrained_'))


def models_of(case):
    ((_, pool, expected),) = (
        oracle_cases(case['case']) if case['status'] == 'ok' else [(0, inputs_of(case), None)]
    )
    return with_buffers(pool, case['params'].get('int64_buffer')), expected


def inputs_of(case):
    models = {Path(p).stem: dict(Checkpoint(ROOT/p)) for p in case['inputs']}
    return ToyPool({n: m for n, m in models.items() if n != 'base'}, models.get('base'))


def ours(case, pool):
    method = method_of(case, pool)
    if case['output_kind'] != 'merged_task_vector': return dict(fuse(method, pool))
    return {k: method.scaling_factor * v for k, v in method.direction(pool).items()}


@pytest.mark.parametrize('name', sorted(MERGES))
def test_a_stored_merge_is_repeated(name):
    case = CASES[name]
    pool, expected = models_of(case)
    got = ours(case, pool)
    assert all(torch.isfinite(t.float()).all() for t in got.values())
    left_out = {*case.get('implementation_defined_tensors', ()), *case.get('non_finite_tensors', ())}
    expected = {k: v for k, v in expected.items() if k not in left_out}
    # an integer is the base's, or the first model's; never a mean
    if 'num_batches' in expected: expected.pop('num_batches')
    if (mask := case.get('tie_mask')) and (tied := Checkpoint(ROOT/mask)):
        got = {k: torch.where(tied[k].bool(), expected[k], v) if k in expected else v for k, v in got.items()}
    if case['comparison'] == 'elementwise':
        agree(
            case, got, expected, skip=OTHERWISE.get(name, case['tolerance'].get('max_mismatched_elements', 0))
        )
        return
    stated = case['bf16_vs_fp32_compute']
    off = torch.cat([(got[k].float() - v.float()).abs().flatten() for k, v in expected.items()])
    assert (off > 0).float().mean() <= stated['fraction_differing'] + .05
    assert name in TIED or off.max() <= 1.01 * stated['max_abs_diff'] + .005


@pytest.mark.parametrize('name', sorted(n for n, c in CASES.items() if c['status'] == 'failed'))
def test_what_raises_there_is_done_or_refused_in_one_line_here(name):
    case = CASES[name]
    pool, _ = models_of(case)
    if 'tall_mask' in name: return # a network for each task; its page has the masks
    if name in REFUSED:
        with pytest.raises(FusionError, match=REFUSED[name]) as e: ours(case, pool)
        assert '\n' not in str(e.value)
        return
    merged = ours(case, pool)
    assert merged.keys() == pool.reference().keys()
    assert all(torch.isfinite(t.float()).all() for t in merged.values())
    if 'num_batches' in merged: assert merged['num_batches'] == pool.pretrained()['num_batches']


@cache
def lessons(): return '\n'.join(p.read_text() for p in PAGES.rglob('6*_*/*.ipynb'))


@pytest.mark.parametrize('name', sorted(ELSEWHERE))
def test_what_is_no_single_merge_is_compared_on_a_page(name): assert name.partition('/')[2] in lessons()
