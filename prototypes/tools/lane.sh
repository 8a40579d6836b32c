#!/bin/bash
# lane.sh CLONE profile:NN ...   (OMP_NUM_THREADS from outside)
. jobs/env.sh; C=$1; shift; cd $C; export PYTHONPATH=$C
for j in "$@"; do p=${j%%:*}; n=${j##*:}
  if [ $p = lfw ]; then export FACEADV_DATA=$DATA; else unset FACEADV_DATA; fi
  s=$(date +%s); .venv/bin/faceadv run $n --profile $p --update --out jobs/out-$p > jobs/logs/$p$n.log 2>&1; echo "$j rc $? $(( $(date +%s)-s )) s $(date +%T)" >> jobs/logs/lanes.log
done
