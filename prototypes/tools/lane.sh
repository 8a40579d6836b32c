#!/bin/bash
# lane.sh CLONE OUT profile:NN ...
. jobs/env.sh; C=$1; O=$2; shift 2; cd $C; export PYTHONPATH=$C; echo -4 > /proc/self/autogroup
for j in "$@"; do p=${j%%:*}; n=${j##*:}
  if [ $p = lfw ]; then export FACEADV_DATA=$DATA; else unset FACEADV_DATA; fi
  s=$(date +%s); .venv/bin/faceadv run $n --profile $p --update --out $O-$p > jobs/logs/$p$n.log 2>&1; echo "$j rc $? $(( $(date +%s)-s )) s $(date +%T)" >> jobs/logs/lanes.log
done
