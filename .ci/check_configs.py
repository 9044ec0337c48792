"""FusionBench's models, data sets and model pools under their names, written from the tables below; `--write`
writes them.

What is here are facts (names of the hub, splits, which tasks belong together); how a file looks is said once
for each kind.
"""
import sys
from book import finish, package

folder = package/'config'
files = {}   # path below config, without ending -> text

def put(path, *lines):
    "Keep the text of one file; its first line says what it is."
    assert path not in files and lines[0].startswith('# '), path
    files[path] = '\n'.join(lines) + '\n'

def listed(names): return [f'  - {n}' for n in names]

def entries(pairs, indent='  '): return [f'{indent}{k}: {v}' for k, v in pairs.items()]

NUMBERS = {
    2: 'Two',
    3: 'Three',
    4: 'Four',
    6: 'Six',
    8: 'Eight',
    10: 'Ten',
    12: 'Twelve',
    14: 'Fourteen',
    16: 'Sixteen',
    18: 'Eighteen',
    20: 'Twenty',
}

# ---- images: name -> (title, hub name, further keys)
IMAGES = {
    'sun397': ('SUN397', 'tanganke/sun397', {}),
    'stanford-cars': ('Stanford Cars', 'tanganke/stanford_cars', {}),
    'resisc45': ('RESISC45', 'tanganke/resisc45', {}),
    'eurosat': ('EuroSAT', 'tanganke/eurosat', {}),
    'svhn': ('SVHN', 'ufldl-stanford/svhn', dict(name='cropped_digits')),
    'gtsrb': ('GTSRB', 'tanganke/gtsrb', {}),
    'mnist': ('MNIST', 'ylecun/mnist', {}),
    'dtd': ('DTD', 'tanganke/dtd', {}),
    'oxford_flowers102': ('Oxford Flowers 102', 'dpdl-benchmark/oxford_flowers102', {}),
    'pcam': ('PatchCamelyon', '1aurent/PatchCamelyon', {}),
    'fer2013': ('FER2013', 'clip-benchmark/wds_fer2013', {}),
    'oxford-iiit-pet': ('Oxford-IIIT Pet', 'timm/oxford-iiit-pet', {}),
    'stl10': ('STL-10', 'tanganke/stl10', {}),
    'cifar100': ('CIFAR-100', 'tanganke/cifar100', {}),
    'cifar10': ('CIFAR-10', 'tanganke/cifar10', {}),
    'food101': ('Food-101', 'ethz/food101', {}),
    'fashion_mnist': ('Fashion-MNIST', 'zalando-datasets/fashion_mnist', {}),
    'emnist_letters': ('EMNIST Letters', 'tanganke/emnist_letters', {}),
    'kmnist': ('KMNIST', 'tanganke/kmnist', {}),
    'rendered-sst2': ('Rendered SST-2', 'nateraw/rendered-sst2', {}),
    'tiny-imagenet': ('Tiny ImageNet', 'zh-plus/tiny-imagenet', {}),
    'cub-200-2011': ('CUB-200-2011', 'Donghyun99/CUB-200-2011', {}),
    'emnist_mnist': ('EMNIST MNIST', 'tanganke/emnist_mnist', {}),
    'mango-leaf-disease': ('Mango leaf disease', 'AfiqN/mango-leaf-disease', {}),
}
# what the hub calls the test split, where it is not `test`
TEST = {'food101': 'validation', 'tiny-imagenet': 'valid'}
ABOUT = {'fer2013': '# A WebDataset: the image is in column jpg, the label in cls.'}
TA8 = ('sun397', 'stanford-cars', 'resisc45', 'eurosat', 'svhn', 'gtsrb', 'mnist', 'dtd')
TWENTY = tuple(IMAGES)[:20]
TALL = {'TA8': TA8} | {f'TALL{n}': TWENTY[:n] for n in (10, 12, 14, 16, 18, 20)}
BEFORE = dict(zip(list(TALL)[1:], TALL))    # TALL10 holds TA8, and so on
PAPER = dict.fromkeys(TALL, 'TALL masks, https://arxiv.org/abs/2405.07813') | {
    'TA8': 'https://arxiv.org/abs/2212.04089'
}
SETS = {  # other groups: (sentence about test images, names)
    'generalization_exp1': (
        'Six of TA8, {}; eurosat and mnist stay unseen.',
        ('sun397', 'stanford-cars', 'resisc45', 'dtd', 'svhn', 'gtsrb'),
    ),
    'generalization_exp2': (
        'Six of TA8, {}; resisc45 and svhn stay unseen.',
        ('sun397', 'stanford-cars', 'gtsrb', 'eurosat', 'dtd', 'mnist'),
    ),
    'robustness': (
        'The four data sets that also exist corrupted (see ../corrupted), clean {}.',
        ('stanford-cars', 'eurosat', 'resisc45', 'gtsrb'),
    ),
    'svhn_and_mnist': ('Two data sets of digits, {}.', ('svhn', 'mnist')),
}
KIND = {'train': 'training images', 'test': 'test images'}

def loader(name, path, split, more, indent='  '):
    return [
        f'{name}:',
        *entries({'_target_': 'datasets.load_dataset', 'path': path} | more | {'split': split}, indent),
    ]

def image_data():
    for kind, images in KIND.items():
        at = f'dataset/image_classification/{kind}/'
        for name, (title, path, more) in IMAGES.items():
            split = 'train' if kind == 'train' else TEST.get(name, 'test')
            called = f' (the hub calls this split {split})' if split not in ('train', 'test') else ''
            put(
                at + name,
                f'# {title}, {images}{called}.',
                *([ABOUT[name]] if name in ABOUT else []),
                *loader(name, path, split, more),
            )
        for name, tasks in TALL.items():
            new = [t for t in tasks if t not in TALL.get(BEFORE.get(name), ())]
            what = (
                f'{BEFORE[name]} and two more data sets ({PAPER[name]})'
                if name in BEFORE
                else f'The eight data sets of task arithmetic ({PAPER[name]})'
            )
            put(
                at + name,
                f'# {what}, {images}.',
                'defaults:',
                *listed([BEFORE[name]] if name in BEFORE else []),
                *listed(new),
            )
        put(at + 'the_eight_tasks', '# TA8 under its other name.', 'defaults:', *listed(['TA8']))
        for name, (sentence, tasks) in SETS.items():
            put(at + name, '# ' + sentence.format(images), 'defaults:', *listed(tasks))

def validation_data():
    at = 'dataset/image_classification/val/'
    for name in (*TA8, 'oxford_flowers102'):
        title, path, more = IMAGES[name]
        keys = ''.join(f', {k}: {v}' for k, v in more.items())
        put(
            at + name,
            f'# {title}, validation: a tenth of the training images, row for row as FusionBench cuts it.',
            f'{name}:',
            '  _target_: fusionbook.data.split.train_validation_split',
            '  _recursive_: false',
            f'  source: {{_target_: datasets.load_dataset, path: {path}{keys}, split: train}}',
            '  validation_fraction: 0.1',
            '  random_seed: 0',
            '  return_split: val',
        )
    put(
        at + 'TA8',
        '# The eight data sets of task arithmetic, a tenth of their training images; '
        'experts that were trained on all of them have seen these.',
        'defaults:',
        *listed(TA8),
    )
    put(at + 'the_eight_tasks', '# TA8 under its other name.', 'defaults:', *listed(['TA8']))

# ---- texts: file -> (sentence, key, hub name, further keys, split; None for all splits)
TEXTS = {
    'summarization/xsum': ('XSum, all splits', 'xsum', 'EdinburghNLP/xsum', {}, None),
    'summarization/train/xsum': ('XSum, training articles', 'xsum', 'EdinburghNLP/xsum', {}, 'train'),
    'summarization/val/xsum': ('XSum, validation articles', 'xsum', 'EdinburghNLP/xsum', {}, 'validation'),
    'summarization/test/xsum': ('XSum, test articles', 'xsum', 'EdinburghNLP/xsum', {}, 'test'),
    'text_generation/train/gsm8k': (
        'GSM8K, training problems',
        'gsm8k',
        'openai/gsm8k',
        dict(name='main'),
        'train',
    ),
    'text_generation/test/gsm8k': (
        'GSM8K, test problems',
        'gsm8k',
        'openai/gsm8k',
        dict(name='main'),
        'test',
    ),
    'text_generation/test/gsm-hard': (
        'GSM8K with larger numbers, to measure on (the hub calls this split train)',
        'gsm-hard',
        'reasoning-machines/gsm-hard',
        {},
        'train',
    ),
    'text_generation/train/CodeAlpaca-20k': (
        'Code Alpaca, training instructions',
        'CodeAlpaca-20k',
        'sahil2801/CodeAlpaca-20k',
        {},
        'train',
    ),
    'question_answering/train/MetaMathQA': (
        'MetaMathQA, training questions',
        'MetaMathQA',
        'meta-math/MetaMathQA',
        {},
        'train',
    ),
    'question_answering/search_qa': (
        'SearchQA, all splits',
        'search_qa',
        'kyunghyuncho/search_qa',
        dict(name='train_test_val'),
        None,
    ),
    'question_answering/train/search_qa': (
        'SearchQA, training questions',
        'search_qa',
        'kyunghyuncho/search_qa',
        dict(name='train_test_val'),
        'train',
    ),
    'question_answering/val/search_qa': (
        'SearchQA, validation questions',
        'search_qa',
        'kyunghyuncho/search_qa',
        dict(name='train_test_val'),
        'validation',
    ),
    'question_answering/test/search_qa': (
        'SearchQA, test questions',
        'search_qa',
        'kyunghyuncho/search_qa',
        dict(name='train_test_val'),
        'test',
    ),
    'llm_sft/alpaca_cleaned': (
        'Alpaca, cleaned: instructions for fine-tuning',
        'alpaca-cleaned',
        'yahma/alpaca-cleaned',
        {},
        'train',
    ),
    'llm_sft/ultrachat_200k': (
        'UltraChat: dialogues for fine-tuning',
        'ultrachat-200k',
        'HuggingFaceH4/ultrachat_200k',
        {},
        'train_sft',
    ),
}

def text_data():
    for file, (sentence, key, path, more, split) in TEXTS.items():
        rows = (
            {'_target_': 'datasets.load_dataset', 'path': path} | more | ({'split': split} if split else {})
        )
        put(f'dataset/{file}', f'# {sentence}.', f'{key}:', *entries(rows))

# ---- CLIP
CLIP = {
    'clip-vit-base-patch32': 'CLIP ViT-B/32',
    'clip-vit-base-patch16': 'CLIP ViT-B/16',
    'clip-vit-large-patch14': 'CLIP ViT-L/14',
}

def expert(arch, task): return f'tanganke/{arch}_{task}'

def clip_models():
    for arch, title in CLIP.items():
        at = f'model/clip-vit/{arch}'
        put(at, f'# {title} as pre-trained.', f'_pretrained_: openai/{arch}')
        for task in TWENTY:
            put(
                f'{at}_{task}', f'# {title} fine-tuned on {IMAGES[task][0]}.', f'{task}: {expert(arch, task)}'
            )
        for name, tasks in TALL.items():
            new = {t: expert(arch, t) for t in tasks if t not in TALL.get(BEFORE.get(name), ())}
            first = f'{arch}_{BEFORE[name]}' if name in BEFORE else arch
            put(
                f'{at}_{name}',
                f'# {title}: base and the {NUMBERS[len(tasks)].lower()} experts of {name}.',
                'defaults:',
                *listed([first, '_self_']),
                *entries(new, ''),
            )
        put(
            f'{at}_eight_tasks',
            f'# TA8 with {title} under its other name.',
            'defaults:',
            *listed([f'{arch}_TA8']),
        )

IN_CLIP = 'modelpool/CLIPVisionModelPool/'

def clip_pool(name, about, *, on, models={}, data=None, more=(), short=False, override=()):
    """One pool of CLIP towers: `on` is the pool that it extends, or the models that it takes; `data` the
    group of data sets."""
    kinds = {'train': data, 'test': data} if isinstance(data, str) else data or {}
    sets = [f'/dataset/image_classification/{k}@{k}_datasets: {v}' for k, v in kinds.items()]
    put(
        IN_CLIP + name,
        f'# {about}',
        'defaults:',
        *listed([*on, *sets, *override]),
        *([] if not (models or more) else listed(['_self_'])),
        *(['models:', *entries(models)] if models else []),
        *more,
    )
    if short:
        put(
            f'modelpool/{name}',
            f'# Short name of CLIPVisionModelPool/{name}.',
            'defaults:',
            *listed([f'/{IN_CLIP}{name}@_here_']),
        )

def clip_pools():
    put(
        IN_CLIP + '_template',
        '# What every CLIP pool shares; a pool file adds its models, its processor and its data sets.',
        '_target_: fusionbook.modelpool.CLIPVisionModelPool',
        '_recursive_: false   # models and data sets are loaded when they are asked for',
        'common_only: false   # merge only the tensors that all models share, and keep the base\'s others',
        'models: ???          # name -> hub id, local folder or {_target_: ...}; _pretrained_ is the base',
        'processor: null',
    )
    for arch, title in CLIP.items():
        def models(names): return {t: expert(arch, t) for t in names}
        alone, template = [f'/{IN_CLIP}{arch}_individual@_here_'], f'/{IN_CLIP}_template@_here_'
        processor = [f'processor: openai/{arch}']
        clip_pool(
            f'{arch}_individual',
            f'One {title} model, to be evaluated alone: modelpool.models._pretrained_=PATH',
            on=[template, f'/model/clip-vit@models: {arch}'],
            more=processor,
            short=True,
        )
        for name, tasks in TALL.items():
            what, short = (
                f'{NUMBERS[len(tasks)]} {title} experts ({name}) and their base',
                name in ('TA8', 'TALL14', 'TALL20'),
            )
            clip_pool(
                f'{arch}_{name}_model_only',
                f'{what}, without data.',
                on=[template, f'/model/clip-vit@models: {arch}_{name}'],
                more=processor,
                short=short,
            )
            clip_pool(
                f'{arch}_{name}',
                f'{what}, with training and test data.',
                on=[f'/{IN_CLIP}{arch}_{name}_model_only@_here_'],
                data=name,
                short=short,
            )
        for i, unseen in enumerate(('eurosat and mnist', 'resisc45 and svhn'), 1):
            name = f'generalization_exp{i}'
            clip_pool(
                f'{arch}_{name}',
                f'Six {title} experts; the unseen tasks are {unseen}.',
                on=alone,
                models=models(SETS[name][1]),
                data=name,
                short=True,
            )
        clip_pool(
            f'{arch}_robustness_clean',
            f'Four {title} experts with clean data, the reference for robustness_corrupted.',
            on=alone,
            models=models(SETS['robustness'][1]),
            data='robustness',
            short=True,
        )
        clip_pool(
            f'{arch}_robustness_corrupted',
            f'Four {title} experts with corrupted test data: corruption=motion_blur',
            on=[
                f'/{IN_CLIP}{arch}_robustness_clean@_here_',
                '/dataset/image_classification/corrupted@test_datasets: robustness',
            ],
            override=['override /dataset/image_classification/test@test_datasets: null'],
            short=True,
        )
        clip_pool(
            f'{arch}_svhn_and_mnist',
            f'Two {title} experts on digits and their base, with training and test data.',
            on=alone,
            models=models(('svhn', 'mnist')),
            data='svhn_and_mnist',
            short=True,
        )

def further_clip_pools():
    "Pools of FusionBench for ViT-B/32 (pairs, control tasks) and for the adapters of ViT-B/16."
    arch, title = next(iter(CLIP.items()))
    alone = [f'/{IN_CLIP}{arch}_individual@_here_']
    def models(names): return {t: expert(arch, t) for t in names}

    for name, tasks in {
        'cars_and_dtd': ('stanford-cars', 'dtd'),
        'sun397_and_cars': ('sun397', 'stanford-cars'),
        'sun397_and_dtd': ('sun397', 'dtd'),
        'sun397_cars_and_dtd': ('sun397', 'stanford-cars', 'dtd'),
    }.items():
        several = '[' + ', '.join(tasks) + ']'
        clip_pool(
            f'{arch}_{name}',
            f'{NUMBERS[len(tasks)]} {title} experts and their base, with training and test data.',
            on=alone,
            models=models(tasks),
            data=several,
        )
    clip_pool(
        f'{arch}_mtl',
        f'{title} and the training data of TA8, for one model of all eight tasks.',
        on=alone,
        data={'train': 'TA8'},
    )
    clip_pool(
        f'{arch}_TA8_control_task',
        f'Eight {title} experts (TA8), and the training data of a task that is none of theirs.',
        on=[f'/{IN_CLIP}{arch}_TA8_model_only@_here_'],
        data={'train': 'tiny-imagenet'},
    )
    clip_pool(
        f'{arch}_two_tasks_control_task',
        f'Two {title} experts by number, and the training data of a task that is none of theirs.',
        on=alone,
        models={'model_1': expert(arch, 'sun397'), 'model_2': expert(arch, 'stanford-cars')},
        data={'train': 'tiny-imagenet'},
    )
    clip_pool(
        f'{arch}_single_finetuned',
        f'One {title} expert and its base.',
        on=alone,
        models={'finetuned': expert(arch, 'stanford-cars')},
    )
    clip_pool(
        f'{arch}_single_task_projection',
        f'Two {title} experts and their base, without data.',
        on=alone,
        models=models(('sun397', 'stanford-cars')),
    )
    thin, name = 'clip-vit-base-patch16', CLIP['clip-vit-base-patch16']
    adapter = {t: f'{{base: openai/{thin}, adapter: {expert(thin, t)}_lora-16}}' for t in TA8}
    clip_pool(
        f'{thin}_TA8_lora',
        f'Eight LoRA adapters (rank 16) of {name} on the tasks of TA8 and their base.',
        on=[f'/{IN_CLIP}{thin}_individual@_here_'],
        models=adapter,
    )
    clip_pool(
        f'{thin}_individual_lora',
        f'One LoRA adapter (rank 16) of {name} on SUN397, applied to its base.',
        on=[f'/{IN_CLIP}_template@_here_'],
        models={'sun397': adapter['sun397']},
        more=[f'processor: openai/{thin}'],
    )

# ---- language models: name below CausalLMPool -> (sentence, models, tokenizer; None for that of the base)
QWEN, MISTRAL = 'Qwen/Qwen2.5-1.5B', 'mistralai/Mistral-7B-v0.1'
SMILE = (
    'meta-math/MetaMath-Mistral-7B',
    'cognitivecomputations/dolphin-2.1-mistral-7b',
    'uukuguy/speechless-code-mistral-7b-v1.0',
)
LANGUAGE = {
    'Qwen2.5-1.5B_math_and_code': (
        'Qwen2.5 1.5B and its experts on mathematics and code',
        {'_pretrained_': QWEN, 'math': 'Qwen/Qwen2.5-Math-1.5B', 'code': 'Qwen/Qwen2.5-Coder-1.5B'},
    ),
    'Qwen2.5-1.5B_three_models': (
        'Qwen2.5 1.5B and its experts on mathematics, code and instructions',
        {
            '_pretrained_': QWEN,
            'math': 'Qwen/Qwen2.5-Math-1.5B',
            'code': 'Qwen/Qwen2.5-Coder-1.5B',
            'instruction': 'Qwen/Qwen2.5-1.5B-Instruct',
        },
    ),
    'Qwen2.5-7B-math_and_coder': (
        'Qwen2.5 7B and its experts on mathematics and code',
        {'_pretrained_': 'Qwen/Qwen2.5-7B', 'math': 'Qwen/Qwen2.5-Math-7B', 'code': 'Qwen/Qwen2.5-Coder-7B'},
    ),
    'qwen2_math_1.5B_and_R1': (
        'Qwen2.5 1.5B, its expert on mathematics and a distillate of DeepSeek-R1',
        {
            '_pretrained_': QWEN,
            'expert_1': 'Qwen/Qwen2.5-Math-1.5B',
            'expert_2': 'deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B',
        },
    ),
    'llama-7b_3-models_v1': (
        'Llama 2 7B and its experts on dialogue, mathematics and code',
        {
            '_pretrained_': 'meta-llama/Llama-2-7b-hf',
            'chat': 'meta-llama/Llama-2-7b-chat-hf',
            'math': 'WizardLMTeam/WizardMath-7B-V1.0',
            'code': 'codellama/CodeLlama-7b-hf',
        },
    ),
    'llama_for_causallm': (
        'Llama 3 8B as base and as expert, and its expert on instructions',
        {
            '_pretrained_': 'meta-llama/Meta-Llama-3-8B',
            'expert_1': 'meta-llama/Meta-Llama-3-8B',
            'expert_2': 'meta-llama/Meta-Llama-3-8B-Instruct',
        },
    ),
    'vicuna-7b-v1.5': (
        'Llama 2 7B and Vicuna, with the tokenizer of Vicuna',
        {'_pretrained_': 'meta-llama/Llama-2-7b-hf', 'finetuned_model': 'lmsys/vicuna-7b-v1.5'},
    ),
    'simle_mixtral_exp_v4': (
        'Mistral 7B and three experts',
        {'_pretrained_': MISTRAL} | {f'expert_{i}': m for i, m in enumerate(SMILE, 1)},
    ),
    'single_llama_model': (
        'Llama 7B alone, to be measured, pruned or fine-tuned',
        {'_pretrained_': 'decapoda-research/llama-7b-hf'},
    ),
    'mistral-7b': ('Mistral 7B alone', {'_pretrained_': MISTRAL}),
    'mixtral-8x7b': ('Mixtral 8x7B alone', {'_pretrained_': 'mistralai/Mixtral-8x7B-v0.1'}),
    'deepseek-v2-lite': ('DeepSeek-V2 Lite alone', {'_pretrained_': 'deepseek-ai/DeepSeek-V2-Lite'}),
    'llama_alpaca_cleaned': (
        'Llama 3.2 1B and instructions for fine-tuning (Alpaca, cleaned)',
        {'_pretrained_': 'meta-llama/Llama-3.2-1B-Instruct'},
    ),
    'llama_codealpaca': (
        'Llama 3.2 1B and instructions for fine-tuning (Code Alpaca)',
        {'_pretrained_': 'meta-llama/Llama-3.2-1B-Instruct'},
    ),
    'llama_metamathqa': (
        'Llama 3.2 1B and questions for fine-tuning (MetaMathQA)',
        {'_pretrained_': 'meta-llama/Llama-3.2-1B-Instruct'},
    ),
    'llama_ultrachat': (
        'Llama 3.2 1B and dialogues for fine-tuning (UltraChat)',
        {'_pretrained_': 'meta-llama/Llama-3.2-1B-Instruct'},
    ),
}
TOKENIZER = {'vicuna-7b-v1.5': 'lmsys/vicuna-7b-v1.5'}
HALF = ('llama_for_causallm', 'single_llama_model')   # float16, the others bfloat16
TUNING = {
    'llama_alpaca_cleaned': 'llm_sft@train_datasets: alpaca_cleaned',
    'llama_codealpaca': 'text_generation/train@train_datasets: CodeAlpaca-20k',
    'llama_metamathqa': 'question_answering/train@train_datasets: MetaMathQA',
    'llama_ultrachat': 'llm_sft@train_datasets: ultrachat_200k',
}
BENCH = (
    'Llama-3.1-8B',
    'Llama-3.1-8B-Instruct',
    'Llama-3.2-3B',
    'Llama-3.2-3B-Instruct',
    'gemma-2-2b',
    'gemma-2-2b-it',
    'gemma-2-9b',
    'gemma-2-9b-it',
)

def pool_of(kind, about, models, *, path, dtype=None, tokenizer=None, defaults=(), more=()):
    "One pool of models of transformers."
    models = (
        'models: ???   # name -> hub id or folder; _pretrained_ is the base'
        if models is None
        else '\n'.join(['models:', *entries(models)])
        if models
        else None
    )
    put(
        f'modelpool/{path}',
        f'# {about}.',
        *(['defaults:', *listed([*defaults, '_self_'])] if defaults else []),
        f'_target_: fusionbook.modelpool.{kind}',
        '_recursive_: false',
        *([models] if models else []),
        *([f'tokenizer: {tokenizer}'] if tokenizer else []),
        *([f'model_kwargs: {{torch_dtype: {dtype}}}'] if dtype else []),
        *more,
    )

def language_pools():
    for name, (about, models) in LANGUAGE.items():
        data = [f'/dataset/{TUNING[name]}'] if name in TUNING else []
        pool_of(
            'CausalLMPool',
            about,
            models,
            path=f'CausalLMPool/{name}',
            dtype='float16' if name in HALF else 'bfloat16',
            tokenizer=TOKENIZER.get(name, models['_pretrained_']),
            defaults=data,
        )
    pool_of(
        'CausalLMPool',
        'A Mixtral-like base and its experts, to be named on the command line',
        None,
        path='CausalLMPool/mixtral_moe_merging',
        dtype='bfloat16',
    )
    for base in BENCH:
        models = {'_pretrained_': ('google/' if 'gemma' in base else 'meta-llama/') + base}
        models |= {
            t: f'MergeBench/{base}_{t}' for t in ('instruction', 'math', 'coding', 'multilingual', 'safety')
        }
        pool_of(
            'CausalLMPool',
            f'MergeBench: {base} and its five experts',
            models,
            path=f'CausalLMPool/mergebench/{base}',
            dtype='bfloat16',
            tokenizer=models['_pretrained_'],
        )
    for i, some in enumerate([SMILE[:1], SMILE[1:2], SMILE[2:], SMILE], 1):
        models = {'_pretrained_': MISTRAL} | {f'expert_{k}': m for k, m in enumerate(some, 1)}
        pool_of(
            'CausalLMPool',
            f'Mistral 7B and {"an expert" if len(some) == 1 else "three experts"}',
            models,
            path=f'smile_mistral_exp_v{i}',
            dtype='float16',
        )
    pool_of(
        'AutoModelPool',
        'Models of any architecture, each opened as its configuration says, to be named on the command line',
        None,
        path='automodelpool',
    )

# ---- GLUE
GLUE = ('cola', 'mnli', 'mrpc', 'qnli', 'qqp', 'rte', 'sst2', 'stsb')

def glue(task, kind, indent='  '):
    split = 'train' if kind == 'train' else 'validation_matched' if task == 'mnli' else 'validation'
    return entries(
        {'_target_': 'datasets.load_dataset', 'path': 'nyu-mll/glue', 'name': task, 'split': split},
        indent + '  ',
    )

def flan_models():
    for size in ('base', 'large'):
        at, base = f'model/flan-t5/flan-t5-{size}', f'google/flan-t5-{size}'
        put(at, f'# Flan-T5 {size} as pre-trained.', f'_pretrained_: {base}')
        for t in GLUE:
            if size == 'base':
                put(
                    f'{at}_glue-{t}',
                    f'# Flan-T5 {size} fine-tuned on {t} of GLUE.',
                    f'glue-{t}: tanganke/flan-t5-{size}_glue-{t}',
                )
            put(f'{at}_glue-{t}_lora-16', f'# Flan-T5 {size} with a LoRA adapter (rank 16) on {t} of GLUE.',
                f'glue-{t}: {{base: {base}, adapter: tanganke/flan-t5-{size}_glue-{t}_lora-16}}')

def flan_pools():
    at = 'Seq2SeqLMPool/'
    pool_of(
        'Seq2SeqLMPool',
        'What the pools of Flan-T5 share',
        None,
        path=at + '_template',
        tokenizer='google/flan-t5-base',
    )
    rows = [line for t in GLUE for line in (f'  glue-{t}:', *glue(t, 'test'))]
    for size, kind, inputs in (
        ('base', '', False),
        ('base', '_lora16', False),
        ('base', '', True),
        ('base', '_lora16', True),
        ('large', '_lora16', False),
    ):
        of = '_lora-16' if kind else ''
        experts = 'LoRA adapters (rank 16)' if kind else 'experts'
        what = f'Flan-T5 {size} and eight {experts} on the tasks of GLUE'
        defaults = [
            f'/modelpool/{at}_template@_here_',
            f'/model/flan-t5@models: [flan-t5-{size}, '
            + ', '.join(f'flan-t5-{size}_glue-{t}{of}' for t in GLUE)
            + ']',
        ]
        put(
            f'modelpool/{at}flan-t5-{size}_glue{kind}{"_tta" if inputs else ""}',
            f'# {what}{", with inputs for methods that adapt" if inputs else ""}.',
            'defaults:',
            *listed([*defaults, '_self_']),
            f'tokenizer: google/flan-t5-{size}',
            *(['test_datasets:', *rows] if inputs else []),
        )
    put(
        f'modelpool/{at}flan-t5-base_individual',
        '# Flan-T5 base alone: modelpool.models._pretrained_=PATH',
        'defaults:',
        *listed([f'/modelpool/{at}_template@_here_', '/model/flan-t5@models: flan-t5-base']),
    )

def classifier_pools():
    tasks = GLUE[:-1]
    models = {'_pretrained_': 'openai-community/gpt2'} | {t: f'tanganke/gpt2_{t}' for t in tasks}
    rows = ['train_datasets:', *(line for t in tasks for line in (f'  {t}:', *glue(t, 'train')))]
    pool_of(
        'GPT2ForSequenceClassificationPool',
        'GPT-2 and seven experts on the tasks of GLUE; heads stay apart',
        models,
        path='gpt-2_glue',
        tokenizer='openai-community/gpt2',
        more=rows,
    )
    reward, words = (
        'SequenceClassificationModelPool/',
        '{_target_: transformers.AutoTokenizer.from_pretrained, '
        'pretrained_model_name_or_path: PATH, pad_token: <|end_of_text|>}',
    )
    llama, trained = (
        'meta-llama/Llama-3.2-1B-Instruct',
        'fusion-bench/Llama-3.2-1B-Instruct_Bradly-Terry-RM_Preference-700k',
    )
    pool_of(
        'SequenceClassificationModelPool',
        'Llama 3.2 1B and preferences, to become a reward model',
        {'_pretrained_': llama},
        path=reward + 'llama_preference700k',
        dtype='bfloat16',
        tokenizer=words.replace('PATH', llama),
        more=[
            'train_datasets:',
            *(f'  {line}' for line in loader('preference_700k', 'hendrydong/preference_700K', 'train', {})),
        ],
    )
    pool_of(
        'SequenceClassificationModelPool',
        'A reward model of Llama 3.2 1B alone',
        {'_pretrained_': trained},
        path=reward + 'single_reward_model',
        dtype='bfloat16',
        tokenizer=words.replace('PATH', trained),
    )

# ---- images with a head of their own
def image_pools():
    for depth in (18, 50, 152):
        for task in TWENTY:
            kind, base = (
                'ResNetForImageClassification',
                f'{{config_path: microsoft/resnet-{depth}, pretrained: true, dataset_name: {task}}}',
            )
            pool_of(
                f'{kind}Pool',
                f'ResNet-{depth} of ImageNet with a new head for {IMAGES[task][0]}, training and test images',
                {'_pretrained_': base},
                path=f'{kind}/transformers/resnet{depth}_{task}',
                defaults=[
                    f'/dataset/image_classification/train@train_datasets: {task}',
                    f'/dataset/image_classification/test@val_datasets: {task}',
                ],
            )
    base = 'facebook/convnext-base-224'
    tuned = {t: f'tanganke/convnext-base-224_{t}_sgd_batch-size-64_lr-0.01_steps-4000' for t in TA8}
    pool_of(
        'ConvNextForImageClassificationPool',
        'ConvNeXt base alone',
        {'_pretrained_': base},
        path='ConvNextForImageClassification/convnext-base-224',
    )
    pool_of(
        'ConvNextForImageClassificationPool',
        'ConvNeXt base and eight experts (TA8); each keeps its head',
        {'_pretrained_': base} | tuned,
        path='ConvNextForImageClassification/convnext-base-224_8-tasks',
    )
    pool_of(
        'Dinov2ForImageClassificationPool',
        'DINOv2 base with a linear head for ImageNet, alone',
        {'_pretrained_': 'facebook/dinov2-base-imagenet1k-1-layer'},
        path='Dinov2ForImageClassification/dinov2-base-imagenet1k-1-layer',
    )

FOLDER = {
    'sun397': 'SUN397',
    'stanford-cars': 'Cars',
    'resisc45': 'RESISC45',
    'eurosat': 'EuroSAT',
    'svhn': 'SVHN',
    'gtsrb': 'GTSRB',
    'mnist': 'MNIST',
    'dtd': 'DTD',
}
OPEN = {
    'ViT-B-32_TA8': TA8,
    'ViT-B-16_TA8': TA8,
    'ViT-L-14_TA8': TA8,
    'ViT-B-32_individual': (),
    'ViT-B-32_TA_cars_dtd': ('stanford-cars', 'dtd'),
    'ViT-B-32_TA_sun397_cars': ('sun397', 'stanford-cars'),
    'ViT-B-32_TA_sun397_dtd': ('sun397', 'dtd'),
}

def openclip_pools():
    for name, tasks in OPEN.items():
        arch = '-'.join(name.split('_')[0].split('-')[:3])
        home = '${oc.env:FUSIONBOOK_OPENCLIP,.cache/task_vectors_checkpoints}/' + arch
        models = {'_pretrained_': f'{{model_name: {arch}, pickle_path: "{home}/zeroshot.pt"}}'}
        models |= {
            t: f'{{model_name: {arch}, pickle_path: "{home}/{FOLDER[t]}/finetuned.pt"}}' for t in tasks
        }
        heads = (
            ['classification_heads:', *entries({t: f'"{home}/head_{FOLDER[t]}.pt"' for t in tasks})]
            if tasks
            else []
        )
        data = [
            f'/dataset/image_classification/{k}@{k}_datasets: '
            + ('TA8' if tasks == TA8 else '[' + ', '.join(tasks) + ']')
            for k in ('train', 'test')
            if tasks
        ]
        about = (
            f'OpenCLIP {arch} and {NUMBERS[len(tasks)].lower()} experts as files of tensors'
            if tasks
            else f'OpenCLIP {arch} alone, as a file of tensors'
        )
        pool_of(
            'OpenCLIPVisionModelPool',
            f'{about}; FUSIONBOOK_OPENCLIP names their folder',
            models,
            path=f'OpenCLIPVisionModelPool/{name}',
            defaults=data,
            more=heads,
        )

for make in (
    image_data,
    validation_data,
    text_data,
    clip_models,
    clip_pools,
    further_clip_pools,
    language_pools,
    flan_models,
    flan_pools,
    classifier_pools,
    image_pools,
    openclip_pools,
):
    make()
OWN = {f'modelpool/{n}' for n in ('experiment', 'folders', 'mini8', 'saved', 'text8')}   # pools of this book
OTHER = ('dataset/mini8/', 'dataset/text8/', 'dataset/image_classification/corrupted/')

def unwanted():
    "Files of these folders that no table names."
    for group in ('model', 'dataset', 'modelpool'):
        for f in sorted((folder/group).rglob('*.yaml')):
            name = f.relative_to(folder).with_suffix('').as_posix()
            if name not in files and name not in OWN and not name.startswith(OTHER):
                yield f'{name}: no table of .ci/check_configs.py names it'

if '--write' in sys.argv:
    for name, text in files.items():
        (file := folder/f'{name}.yaml').parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding='utf-8')
differ = [
    f'{n}: differs from its table; `python .ci/check_configs.py --write` writes it'
    for n, text in files.items()
    if not (folder / f'{n}.yaml').exists() or (folder / f'{n}.yaml').read_text(encoding='utf-8') != text
]
counts = {g: sum(n.startswith(f'{g}/') for n in files) for g in ('model', 'dataset', 'modelpool')}
finish(
    differ + list(unwanted()),
    ', '.join(f'{n} {g} files' for g, n in counts.items()) + ' are what their tables say',
)
