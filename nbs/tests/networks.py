"Tiny networks of `transformers`, each with inputs that it answers."
import torch
import transformers as t

SMALL = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
TEXT = dict(**SMALL, vocab_size=40, max_position_embeddings=32)
IMAGE = dict(**SMALL, image_size=16, patch_size=8)
KEYS = dict(num_key_value_heads=1)
GPT = dict(
    n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=32, bos_token_id=0, eos_token_id=1
)
T5 = dict(d_model=16, d_ff=24, d_kv=8, num_layers=2, num_heads=2, vocab_size=40)
RESNET = dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])

IDS = dict(input_ids=torch.arange(6)[None] + 3)
PIXELS = dict(pixel_values=torch.linspace(0, 1, 3*16*16).view(1, 3, 16, 16))
PAIRS = IDS | dict(decoder_input_ids=torch.arange(4)[None])


def llama(**more): return t.LlamaForCausalLM(t.LlamaConfig(**TEXT, **KEYS, **more))


def whole_clip():
    text = dict(TEXT, projection_dim=8)
    return t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=IMAGE, projection_dim=8))


NETS = { # kind -> (what makes one, its inputs)
    'llama': (llama, IDS),
    'llama_tied': (lambda: llama(tie_word_embeddings=True), IDS),
    'mistral': (lambda: t.MistralForCausalLM(t.MistralConfig(**TEXT, **KEYS)), IDS),
    'qwen2': (lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**TEXT, **KEYS)), IDS),
    'qwen3': (lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**TEXT, **KEYS, head_dim=8)), IDS),
    'mixtral': (lambda: t.MixtralForCausalLM(t.MixtralConfig(**TEXT, **KEYS, num_local_experts=2)), IDS),
    'gpt2': (lambda: t.GPT2LMHeadModel(t.GPT2Config(**GPT)), IDS),
    'gpt2_classes': (lambda: t.GPT2ForSequenceClassification(t.GPT2Config(**GPT, pad_token_id=0)), IDS),
    'bert': (lambda: t.BertForSequenceClassification(t.BertConfig(**TEXT)), IDS),
    't5': (lambda: t.T5ForConditionalGeneration(t.T5Config(**T5)), PAIRS),
    'clip_vision': (lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**IMAGE)), PIXELS),
    'clip': (whole_clip, IDS | PIXELS),
    'resnet': (lambda: t.ResNetForImageClassification(t.ResNetConfig(**RESNET)), PIXELS),
    'vit': (lambda: t.ViTForImageClassification(t.ViTConfig(**IMAGE, num_labels=3)), PIXELS),
}
