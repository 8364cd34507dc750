"""What tiny pipelines are made of: text encoders, tokenizers that know letters and digits, autoencoders."""

import functools
import string
from collections.abc import Callable
from typing import Any

import diffusers as d
import torch
import transformers as t
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

Made = tuple[Any, dict[str, Any]]
FAMILIES: dict[str, Callable[["Parts"], Made]] = {}
VIDEO, SOUND, EDIT = set(), set(), set()
CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
HEADS = dict(attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32)


def family(name: str, *kinds: set[str]) -> Callable[[Callable[["Parts"], Made]], Callable[["Parts"], Made]]:
    def register(make: Callable[["Parts"], Made]) -> Callable[["Parts"], Made]:
        FAMILIES[name] = make
        for kind in kinds:
            kind.add(name)
        return make

    return register


def picture(seed: int = 0, size: int = 16, mode: str = "RGB") -> Image.Image:
    pixels = torch.randint(256, (size, size, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy()).convert(mode)


class Parts:
    """Text encoders, tokenizers and autoencoders that families share."""

    letters = (*string.ascii_letters, *string.digits, *" .,:;!?-_'\"<>|/[]{}()=#*\n")

    @functools.cached_property
    def t5_words(self) -> Any:
        pieces = [
            ("<pad>", 0.0),
            ("</s>", 0.0),
            ("<unk>", 0.0),
            ("▁", -2.0),
            *((c, -3.0) for c in self.letters),
        ]
        return t.T5Tokenizer(pieces, extra_ids=0, model_max_length=64)

    def t5(self, kind: str = "T5") -> Any:
        config = getattr(t, f"{kind}Config")(
            vocab_size=len(self.t5_words), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2
        )
        return getattr(t, f"{kind}EncoderModel")(config).eval()

    @functools.cached_property
    def words(self) -> Any:
        """A byte-level tokenizer with a chat template."""
        special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<unk>", "<|vision_start|>",
                   "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]  # fmt: skip
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        base = Tokenizer(models.BPE({word: i for i, word in enumerate([*special, *alphabet])}, []))
        base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        base.decoder = decoders.ByteLevel()
        base.add_special_tokens(special)
        base.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
        found = t.PreTrainedTokenizerFast(
            tokenizer_object=base, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
            model_max_length=512,
        )  # fmt: skip
        found.chat_template = CHAT
        return found

    @functools.cached_property
    def clip_words(self) -> Any:
        words = [*self.letters, *(f"{c}</w>" for c in self.letters), "<|startoftext|>", "<|endoftext|>"]
        return t.CLIPTokenizer({w: i for i, w in enumerate(words)}, [], model_max_length=12)

    def clip(self, projection: bool = False) -> Any:
        words = self.clip_words
        config = t.CLIPTextConfig(
            vocab_size=len(words), hidden_size=16, intermediate_size=24, projection_dim=16, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=12, bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
        )  # fmt: skip
        return (t.CLIPTextModelWithProjection if projection else t.CLIPTextModel)(config).eval()

    def decoder_only(self, kind: str, of: str, width: int = 16, **more: Any) -> Any:
        config = getattr(t, f"{kind}Config")(
            vocab_size=len(self.words), hidden_size=width, intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, **more,
        )  # fmt: skip
        return getattr(t, of)(config).eval()

    def vae(self, channels: int = 4, **more: Any) -> Any:
        return d.AutoencoderKL(
            3, 3, ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2, (8, 8), latent_channels=channels,
            norm_num_groups=4, **{"shift_factor": 0.06, "scaling_factor": 1.5} | more,
        )  # fmt: skip

    def wan_vae(self) -> Any:
        return d.AutoencoderKLWan(
            base_dim=3,
            z_dim=16,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
        )

    def ltx_vae(self) -> Any:
        four = (8, 8, 8, 8)
        vae = d.AutoencoderKLLTXVideo(
            latent_channels=8, block_out_channels=four, decoder_block_out_channels=four,
            layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5,
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False), decoder_inject_noise=(False,) * 5,
            upsample_residual=(False,) * 4, upsample_factor=(1,) * 4, timestep_conditioning=False,
            patch_size=1, patch_size_t=1, encoder_causal=True, decoder_causal=False,
        )  # fmt: skip
        vae.use_framewise_encoding = vae.use_framewise_decoding = False
        return vae

    def flow(self, **more: Any) -> Any:
        return d.FlowMatchEulerDiscreteScheduler(**more)

    def unipc(self) -> Any:
        return d.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
