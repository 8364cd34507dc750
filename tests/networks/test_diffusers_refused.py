"""What cannot be fine-tuned as a diffusers pipeline is refused in one line that says what would be right."""

import builtins
import json


def test_bad_input_is_one_line(run_cli, pipeline_folder, prompts_file, tmp_path, monkeypatch):
    def refused(*command):
        ended = run_cli(*command)
        assert ended.code == 2 and ended.err.count("\n") == 1, (ended.code, ended.err)
        return ended.err

    def of_pipeline(kind):
        return ("--model", f"diffusers:{pipeline_folder(kind)}", "--prompts", prompts_file, "--image-size", 8)

    def model(name, files):
        for file, values in files.items():
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text(json.dumps(values))
        return (
            "finetune",
            "--model",
            f"diffusers:{name}",
            "--prompts",
            prompts_file,
            "--reward",
            "brightness",
        )

    sd3 = ("finetune", *of_pipeline("sd3"), "--reward", "brightness")
    sd1 = {"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "PNDMScheduler"]}
    assert "no flow-matching pipeline" in refused(*model("sd1", {"model_index.json": sd1}))
    odd = json.loads((pipeline_folder("sd3") / "model_index.json").read_text())
    odd["scheduler"] = ["diffusers", "DDIMScheduler"]
    assert "DDIMScheduler is no flow" in refused(*model("odd", {"model_index.json": odd}))
    assert "model_index.json" in refused(*model("empty", {"x.json": {}}))
    modular = {"_class_name": "ZImageModularPipeline", "_blocks_class_name": "ZImageAutoBlocks"}
    assert "a modular pipeline of diffusers" in refused(*model("m", {"modular_model_index.json": modular}))
    damaged = {"model_index.json": json.loads((pipeline_folder("sd3") / "model_index.json").read_text())}
    assert "transformer/config.json" in refused(*model("damaged", damaged))
    assert "no such folder" in refused(*model("sd1", {})[:2], "diffusers:some/where", *sd3[3:])
    assert "multiples of 2 pixels; use 8 or 10" in refused(*sd3, "--image-size", 9)
    assert "up to 32 pixels" in refused(*sd3, "--image-size", 34)
    assert "multiples of 4" in refused(
        "finetune", *of_pipeline("flux"), "--image-size", 10, "--reward", "brightness"
    )
    empty = tmp_path / "none.txt"
    empty.write_text("\n")
    assert "holds no prompt" in refused(*sd3, "--prompts", empty)
    assert "needs a file of prompts" in refused(*sd3, "--prompts", "")
    assert "needs a --reward" in refused(*sd3[:-2])
    assert "made without" in refused(
        "finetune", *of_pipeline("schnell"), "--guidance", 4, "--reward", "brightness"
    )
    assert run_cli("pretrain", "--data", "moons", "--steps", 2, "--out", "base", "--quiet").code == 0
    assert "only a diffusers pipeline" in refused("sample", "base", "--grid", "own")
    assert "is no pipeline" in refused("finetune", "--checkpoint", "base", "--gradient-checkpointing")
    assert "take several prompts for one" in refused("predict", f"diffusers:{pipeline_folder('sd3')}", *sd3[3:5],
                                                     "--reward", "brightness")  # fmt: skip

    def without(name, *rest):
        if name.partition(".")[0] == "transformers":
            raise ImportError("No module named 'transformers'", name="transformers")
        return real(name, *rest)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without)
    assert "transformers is missing: pip install 'orwcfm-fast[diffusers]'" in refused(*sd3)
