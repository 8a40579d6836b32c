import sys
from PIL import Image
*f,o=sys.argv[1:]
ims=[Image.open(i).convert('RGB') for i in f]
w=max(i.width for i in ims); h=sum(i.height for i in ims)
im=Image.new('RGB',(w,h),'white'); y=0
for i in ims: im.paste(i,(0,y)); y+=i.height
im.save(o)
