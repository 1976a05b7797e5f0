"""WHAT is trained: one file a method, one line here."""

from tunewright.core.registry import Table

TUNERS = Table(
    "tuner",
    {
        "full": "tunewright.tuners.full:Full",
        "half": "tunewright.tuners.half:HalfFineTuning",
        "child_f": "tunewright.tuners.child_f:ChildTuningF",
        "child_d": "tunewright.tuners.child_d:ChildTuningD",
        "fishmask": "tunewright.tuners.fishmask:FishMask",
        "bitfit": "tunewright.tuners.bitfit:BitFit",
        "last_layers": "tunewright.tuners.last_layers:LastLayers",
        "lora": "tunewright.tuners.lora:LoRA",
        "rslora": "tunewright.tuners.rslora:RankStabilisedLoRA",
        "dora": "tunewright.tuners.dora:DoRA",
        "adalora": "tunewright.tuners.adalora:AdaLoRA",
        "dylora": "tunewright.tuners.dylora:DyLoRA",
        "vera": "tunewright.tuners.vera:VeRA",
        "oft": "tunewright.tuners.oft:OFT",
        "ia3": "tunewright.tuners.ia3:IA3",
        "houlsby": "tunewright.tuners.bottleneck:Houlsby",
        "pfeiffer": "tunewright.tuners.bottleneck:Pfeiffer",
        "parallel": "tunewright.tuners.bottleneck:Parallel",
        "prompt": "tunewright.tuners.prompt:PromptTuning",
        "p_tuning": "tunewright.tuners.p_tuning:PTuning",
        "prefix": "tunewright.tuners.prefix:PrefixTuning",
    },
)
