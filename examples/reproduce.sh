#!/bin/sh
# KDC-Diff's experiment, from Stable Diffusion 1.5 to the final table: docs/reproducing.md explains every step.
#
#   TEACHER=stable-diffusion-v1-5/stable-diffusion-v1-5 FLOWERS=data/flowers BUTTERFLIES=data/butterflies \
#     METRICS=weights OUT=reproduction sh examples/reproduce.sh
#
# FLOWERS is in Oxford's layout, BUTTERFLIES in that of the 100 species. Runs that were interrupted go on: run it again.
# TEACHER_FLAGS and STUDENT_FLAGS change settings, e.g. STUDENT_FLAGS="--steps 20000".
set -eu

: "${TEACHER:?a diffusers folder or a hub id}" "${FLOWERS:?a folder}" "${BUTTERFLIES:?a folder}"
OUT=${OUT:-reproduction}

train() { # NAME FLAGS...: start the run, or go on with it; a finished run is left alone
  name=$1
  shift
  if [ -e "$OUT/$name/results.json" ]; then return; fi
  if [ -e "$OUT/$name/config.json" ]; then
    kdc-edge train --resume --out "$OUT/$name"
  else
    kdc-edge train --out "$OUT/$name" --cache "$OUT/cache" \
      --task "flowers=oxford-flowers:$FLOWERS" --caption "flowers={name}" \
      --task "butterflies=butterflies:$BUTTERFLIES" --caption "butterflies={name}" \
      ${METRICS:+--metric-weights "$METRICS"} "$@"
  fi
}

# 1. The teacher is fine-tuned on both data sets; replay of everything keeps the first.
train teacher --recipe sd-finetune --teacher "$TEACHER" --replay 100000 ${TEACHER_FLAGS:-}

# 2. The student, with latent replay and without.
train kdc-diff --recipe kdc-diff --teacher "$OUT/teacher/checkpoint" ${STUDENT_FLAGS:-}
train no-replay --recipe kdc-diff --teacher "$OUT/teacher/checkpoint" --replay 0 ${STUDENT_FLAGS:-}

# 3. The table.
python -m kdc_edge.train.tools.table "$OUT/kdc-diff" "$OUT/no-replay" > "$OUT/table.md"
cat "$OUT/table.md"
