"""What `eval_drill.py` wants: a model of GLIP-T's size, small real sets of every task, a recipe.

    PYTHONPATH=infra python infra/eval_drill_sets.py DATA --out runs/eval_drill
    R=runs/eval_drill; python infra/eval_drill.py $R/recipe.yaml --checkpoint $R/model --out $R

DATA holds, each as it is published or as an excerpt: coco_mini and coco128 (train2017/,
annotations/), odinw/raccoon, odinw/bccd and odinw/pascalvoc2012 (VOC), odinw/aquarium (YOLO),
grounding_flickr30k_entities, refcoco (*.json about the COCO images), vqa_daquar/val.csv, and
vqa_pope_coco (about coco_val_panoptic/val2017). What no small set exists of is made from COCO's:
LVIS (frequencies and negatives by lot), PhraseCut (the masks of one category). The model's weights
are random, written as a `.pth` under GLIP's names and read back by the converter; its other heads
are untrained.
"""

import argparse
import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from untrained_teacher import save_teacher

from glipv2.eval.masks import mask_area
from glipv2.jobs.convert import from_glip_file, to_glip_file
from glipv2.jobs.prepare import prepare_set
from glipv2.model.config import InputConfig, preset
from glipv2.model.glip import build_model
from glipv2.model.tokenizer import tiny_vocab
from glipv2.model.weights import from_pretrained, model_files
from glipv2.pipeline.config import PrepareConfig
from glipv2.pipeline.records import Record, Region
from glipv2.pipeline.shard_reader import iterate_records, open_shard_set
from glipv2.pipeline.shards import write_shard_set

SMALL = InputConfig(short_side=256, long_side=384, pad_to=None)
ANSWERS = ("yes", "no", "chair", "table", "white", "2")
PER_SHARD = 4
"""Records, so that there is something to kill between."""
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/eval_drill"))
    arguments = parser.parse_args()
    sets = arguments.out / "data"
    prepare_real(arguments.data, sets)
    made_from_coco(sets)
    save_model(arguments.out)
    recipe = {
        "run_dir": str(arguments.out / "run"),
        "data": {"root": str(sets)},
        "eval": {"suites": suites(), "num_actors": 2, "batch_size": 2},
    }
    (arguments.out / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))


def prepare_real(data: Path, out: Path) -> None:
    """Every real set as its source reads it."""
    coco = [str(data / name / "train2017") for name in ("coco_mini", "coco128")]
    instances = str(data / "coco_mini" / "annotations" / "instances_train2017.json")
    captions = str(data / "coco_mini" / "annotations" / "captions_train2017.json")
    expressions = {
        name: str(data / "refcoco" / f"{file}_annotation_test.subset.json")
        for name, file in (("refcoco", "refcoco"), ("plus", "refcoco+"), ("g", "refcocog"))
    }
    odinw = data / "odinw"
    voc = {
        "raccoon": ("annotations", "images"),
        "bccd": ("Annotations", "JPEGImages"),
        "pascalvoc2012": ("Annotations", "JPEGImages"),
    }
    options = {
        "coco": PrepareConfig(source="coco", annotations=(instances,), images=(coco[0],)),
        "captions": PrepareConfig(source="coco-captions", annotations=(captions,),
                                  images=(coco[0],)),
        "aquarium": PrepareConfig(source="yolo", root=str(odinw / "aquarium"), split="test"),
        "flickr30k": PrepareConfig(source="flickr30k-entities",
                                   root=str(data / "grounding_flickr30k_entities")),
        "daquar": PrepareConfig(source="vqav2", images=(str(data / "vqa_daquar" / "images"),),
                                annotations=(str(data / "vqa_daquar" / "val.csv"),)),
        "pope": PrepareConfig(source="vqav2", images=(str(data / "coco_val_panoptic" / "val2017"),),
                              annotations=(str(data / "vqa_pope_coco" /
                                               "coco_pope_random.subset.json"),)),
        **{name: PrepareConfig(source="voc", annotations=(str(odinw / name / files),),
                               images=(str(odinw / name / images),))
           for name, (files, images) in voc.items()},
        **{name: PrepareConfig(source="refcoco", annotations=(file,), images=tuple(coco))
           for name, file in expressions.items()},
    }  # fmt: skip
    for name, own in options.items():
        prepare_set(str(out / name), own, samples_per_shard=PER_SHARD)


def made_from_coco(out: Path) -> None:
    coco, draw = open_shard_set(str(out / "coco")), random.Random(SEED)
    frequency = [draw.choice("rcf") for _ in coco.categories]
    few = [record for record, _ in zip(iterate_records(coco.url), range(16), strict=False)]
    lvis = [_federated(record, len(coco.categories), draw) for record in few]
    write_shard_set(str(out / "lvis"), lvis, coco.categories, {"frequency": frequency}, PER_SHARD)
    phrases = [own for record in few for own in _phrase(record, coco.categories)]
    write_shard_set(str(out / "phrasecut"), phrases, (), {}, PER_SHARD)


def _federated(record: Record, categories: int, draw: random.Random) -> Record:
    """Without crowds; a few absent categories are said to be looked for."""
    regions = tuple(region for region in record.regions if not region.crowd)
    absent = sorted(set(range(categories)) - {r.category for r in record.regions if r.category})
    searched = {"neg_categories": draw.sample(absent, 5), "not_exhaustive_categories": []}
    return dataclasses.replace(record, regions=regions, provenance=record.provenance | searched)


def _phrase(record: Record, categories: tuple[str, ...]) -> Iterator[Record]:
    """One expression: the category whose masks are largest, and all of its masks."""
    by_category: dict[int, list[Region]] = {}
    for region in record.regions:
        if region.mask and region.category is not None and not region.crowd:
            by_category.setdefault(region.category, []).append(region)
    if by_category:
        areas = {c: sum(mask_area(r.mask or {}) for r in own) for c, own in by_category.items()}
        best = max(areas, key=lambda c: areas[c])
        text = categories[best]
        spans = ((0, len(text)),)
        regions = tuple(
            Region(box=r.box, spans=spans, phrase=text, mask=r.mask) for r in by_category[best]
        )
        yield dataclasses.replace(record, task="referring", caption=text, regions=regions)


def save_model(out: Path) -> None:
    """OUT/model: from OUT/glip.pth through the converter, with heads for every task."""
    plain, converted, folder = out / "plain", out / "converted", out / "model"
    shape = dataclasses.replace(
        preset("T"), masked_words=False, contrast=False, glip_compatible=True
    )
    save_teacher(plain, shape)
    to_glip_file(str(plain), str(out / "glip.pth"))
    known = tiny_vocab()
    missing = range(len(known), shape.text_encoder.vocab_size)
    words = [*known, *(f"[unused{number}]" for number in missing)]
    (out / "vocab.txt").write_text("\n".join(words) + "\n")
    from_glip_file(str(out / "glip.pth"), str(converted), str(out / "vocab.txt"), ema=False)
    glip, tokenizer = from_pretrained(converted)
    config = dataclasses.replace(
        glip.config, input=SMALL, masks=True, answers=ANSWERS, captions=True
    )
    model = build_model(config, seed=SEED)
    unknown = model.load_state_dict(glip.state_dict(), strict=False).unexpected_keys
    if unknown:
        raise SystemExit(f"weights that no part has: {', '.join(unknown)}")
    folder.mkdir()
    for name, content in model_files(model, tokenizer).items():
        (folder / name).write_bytes(content)


def suites() -> dict[str, dict[str, object]]:
    detection = {name: name for name in ("raccoon", "bccd", "pascalvoc2012", "aquarium")}
    return {
        "coco": {"set": "coco", "masks": True, "chunk_size": 40, "limit": 12},
        "lvis": {"set": "lvis", "task": "lvis", "chunk_size": 40, "max_boxes": 0, "limit": 8},
        "odinw": {"sets": detection, "limit": 4},
        "flickr30k": {"set": "flickr30k", "task": "phrases", "limit": 16},
        "refcoco": {"sets": {name: name for name in ("refcoco", "plus", "g")},
                    "task": "referring", "limit": 8},
        "phrasecut": {"set": "phrasecut", "task": "segmentation", "limit": 8},
        "daquar": {"set": "daquar", "task": "vqa", "limit": 8},
        "pope": {"set": "pope", "task": "vqa"},
        "captions": {"set": "captions", "task": "captioning", "limit": 4},
    }  # fmt: skip


if __name__ == "__main__":
    torch.manual_seed(SEED)
    main()
