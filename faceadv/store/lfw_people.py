"""Who of LFW may be trained on: the identity-disjoint halves of View 1.

scikit-learn's mirror of LFW has the pairs but not peopleDevTrain.txt and peopleDevTest.txt, which name the
4,038 and the 1,711 people. One bit for each person in the sorted list of all 5,749 names says it in a
kilobyte: 1 is test.
"""

import base64
import hashlib

import numpy as np

from faceadv.errors import Invalid

# SHA-256 of the sorted names, a line each
EVERYONE = "2ae7938ec33d207716d015bd905afd14b781ffd5fddf51f26f91fa4c42174131"
# made by base64(numpy.packbits([name in peopleDevTest for name in sorted(names)])); a test compares the lists
TEST_BITS = (
    "UMFJokIJawQDIDIUSBABoGqEQDALACZhgOghRUIxjHIQIDQiAAQgJyMVAIQTgMnQAiCwRwCAJn0E6QaSgEKAEIoAqMCcIUTA"
    "kACJAIoEqBQkA9YBgKSQi80QQIIp6iwQMkdMg0AWqoBR8ICzxAK4UDiAcEPgUyAAJYWDBBLE2KhBAMAOMoAzgSJCgVIAANcE"
    "PDhEHEyAEOgkApCkABCgAYBCVAiiFAAKSSCQSCHGGLiIEIEADAByMKCACsbAmM6PoNQtkCIwDRGIEmiMHI5GEEK0ANAlIY4C"
    "QQKR0XBQCyAROANRdA4SEbAkwiGpsKQgLSgCaCAK0JwULaBcSASpIRRckIgIBhAwmCYIEALLAIICUIVRQ2AMiHL6hiJCAKA0"
    "JVRAbugAxIEERIBHhqATJFBxGDojKIjAy9lA4jlFjC1aMmmWkQgCEAAEAjAM+CQTkAgQwKoYUOQBICAagYigACmDTjAAEgEn"
    "EAMdBFAiKCBEZZA4AAABKMESABCIChB4QgAAkwUSFXLIUECjBzGAsZEyjSRwNAAhABVUNQABAkioVwKUASAZaw0AkiwAZpyo"
    "EKQgEbAwhjJK4DWgQOwgAHkhBwUEgCUTgqIMHxCgASA5qgsCRQBTGCIECpXAAIBRIBAjQZwCDEABwngKZMSYwAAGAAAQJ+Dw"
    "QCAwEyLAihp2wiUwgREQSioWCQxCmAwBQkeRAEoJS5gLAk0IzAApnJSOwFpUTxjUlAAFIoQgTCQ4GAU0iAAAggRnFgIYwEIg"
    "jdGeZKyGLugGJ9VWhRAAoojFGxBxAWGABFyoXBH5mAAAKzgihABRJwxDc9ECDKBHAZIwCPKBOVQAR2ARUXIEEggDsILA0oY9"
    "BpKAEwIQBAVYWoRARFBjuoxCSmWFEIFowXliEigAAcDxYBA8jIIcBAAkARMc0y6IsLQA9CLUUUwchFiXYhBAegiCA0AZg1A="
)


def dev_people(names, which):
    """The people of View 1's "train" (4,038) or "test" (1,711) half, sorted.

    names: the names of all 5,749 people of LFW. Raises ``ValueError`` if they are not, or for another
    ``which``.
    """
    if which not in ("train", "test"):
        raise Invalid(f'which must be "train" or "test", not {which!r}.')
    names = sorted(names)
    if hashlib.sha256("\n".join(names).encode()).hexdigest() != EVERYONE:
        raise Invalid(f"These {len(names):,} names are not the 5,749 people of LFW, so its split does not apply.")
    bits = np.unpackbits(np.frombuffer(base64.b64decode(TEST_BITS), np.uint8))[: len(names)]
    return [name for name, test in zip(names, bits) if bool(test) == (which == "test")]
