#!/bin/bash
. jobs/env.sh; cd ${C:-.}; export OMP_NUM_THREADS=1 FACEADV_DATA=$DATA
python -m pytest -q -p no:cacheprovider "$@" > jobs/logs/suite-$NAME.log 2>&1; echo "$NAME rc $? $(date +%T)" >> jobs/logs/lanes.log
