b=$(date +%s)
cp .gpu/whl1/*.whl /tmp/whl/
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site /tmp/whl/*.whl || exit 9
mkdir -p /tmp/site/face_recognition_models/models; touch /tmp/site/face_recognition_models/__init__.py; cp /tmp/base/dat /tmp/site/face_recognition_models/models/dlib_face_recognition_resnet_model_v1.dat
echo installed $(( $(date +%s) - b )); nvidia-smi -L; nproc; grep -m1 'model name' /proc/cpuinfo; grep -o -m1 'amx_bf16' /proc/cpuinfo | head -1
pkill -f all.py; pkill nvidia-cuda-mps; rm -rf /tmp/repo /tmp/w /tmp/cache*; cp -r . /tmp/repo; cd /tmp/repo; mkdir -p /tmp/w
export PYTHONPATH=/tmp/site:/tmp/repo
setsid nohup python3 .gpu/s/all.py $1 > /tmp/w/all.log 2>&1 &
for i in $(seq 1 $2); do sleep 1; grep -q '^tests' /tmp/w/logs/gpu.log 2>/dev/null && break; done
cat /tmp/w/logs/gpu.log | cut -c1-1500; echo ------; tail -c 3000 /tmp/w/all.log; echo; tail -n 2 /tmp/w/logs/*.log | cut -c1-200 | grep -v '^$' | tail -60; nvidia-smi | tail -25 | head -5
cp /tmp/w/gpu.json $OUT/
