"""The page `docs/jobs.md`, generated from the table of recipes: `python -m sdllava.train.jobs_page` prints it."""

from .recipe_loading import find_recipe, list_recipes, load_recipe
from .recipe_rows import Recipe
from .recipe_table import RECIPES, SECTIONS

INTRODUCTION = """\
# Recipes as jobs

This page is generated from `sdllava/train/recipe_table.py`: `python -m sdllava.train.jobs_page > docs/jobs.md`.

Each line below trains one recipe with [Hugging Face Jobs](https://huggingface.co/docs/hub/jobs) on 4 GPUs and pushes
the model to a repository of yours. The commands were checked with `hf jobs run --dry-run`. **No job was run.**

1. Prepare the data of both stages once, and copy it to a bucket. The weights of Vicuna and of CLIP are converted, since
   their repositories may hold them as pickles only. Recipes of CleanDIFT also need its [folders](families.md#cleandift)
   in `data/models`.

   ```bash
   sdllava data prepare llava-558k data     # lists what to download; run it again to unpack
   sdllava data prepare mix-665k data
   sdllava convert lmsys/vicuna-7b-v1.5 data/vicuna-7b-v1.5
   sdllava convert openai/clip-vit-large-patch14-336 data/clip-336
   hf buckets create llava-data
   hf buckets sync data hf://buckets/$OWNER/llava-data
   ```

2. Define the command `job`. `hf jobs hardware` lists the flavors and their prices.

   ```bash
   export OWNER=YOUR_NAME_ON_THE_HUB
   job() {  # a recipe, then further arguments of `sdllava train`
     hf jobs run --detach --flavor a100x4 --timeout 24h --secrets HF_TOKEN \\
       --volume "hf://buckets/$OWNER/llava-data:/data" python:3.12 bash -c "
         cd / && pip install 'sdllava[train,deepspeed,quantize]' trackio &&
         CONFIGS=\\$(python -c 'import sdllava; print(sdllava.__path__[0])')/train/configs &&
         accelerate launch --config_file \\$CONFIGS/zero2.yaml --num_processes 4 -m sdllava.train --config $1 ${*:2} \\
           --report_to trackio --trackio_space_id sdllava --push_to_hub true --hub_model_id $OWNER/sdllava-${1//\\//-}"
   }
   ```

3. Run the recipes. Stage 2 starts from the repository that stage 1 pushed, so wait for it: `hf jobs ps`.
"""


OWN_DATA = """\
## Your own data

Copy it to the bucket, and start from a model on the Hub: `hf buckets sync own hf://buckets/$OWNER/llava-data/own`.
QLoRA on several GPUs is untested.

```bash
"""


IN_BUCKET = {
    "lmsys/vicuna-7b-v1.5": "/data/vicuna-7b-v1.5",
    "openai/clip-vit-large-patch14-336": "/data/clip-336",
    "models/cleandift-sd15": "/data/models/cleandift-sd15",
    "models/cleandift-sd21": "/data/models/cleandift-sd21",
}
"""Where a job finds parts that recipes name otherwise."""


def command(recipe: Recipe) -> str:
    """The command `job` of a recipe. A second stage reads its first stage from the Hub."""
    parts = ["job", recipe.name]
    values = load_recipe(find_recipe(recipe.name))
    if first := values.get("init_from"):
        parts.append(f"--init_from $OWNER/sdllava-{first.removeprefix('runs/').replace('/', '-')}")
    else:
        sources = ((name, values.get(name)) for name in ("diffusion", "vision", "language_model"))
        parts += [f"--{name} {IN_BUCKET[source]}" for name, source in sources if source in IN_BUCKET]
    return " ".join(parts)


def documentation() -> str:
    """The page `docs/jobs.md`."""
    lines = [INTRODUCTION]
    for title, recipes in SECTIONS.items():
        lines += [f"## {title}", "", "```bash", *(command(recipe) for recipe in recipes), "```", ""]
    data = "--init_from MODEL --train_data /data/own/own.json --image_folder /data/own/images"
    own = [f"job {name} {data}" for name in list_recipes() if name not in RECIPES]
    return "\n".join([*lines, OWN_DATA + "\n".join(own), "```", ""])


if __name__ == "__main__":
    print(documentation(), end="")
