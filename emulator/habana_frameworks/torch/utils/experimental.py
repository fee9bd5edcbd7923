"""Which card it is: a Gaudi 2, the oldest that optimum-habana still supports in full."""

from enum import IntEnum

from habana_frameworks.torch import hpu

__all__ = ["_get_device_type", "_is_fp16_supported", "hpu", "synDeviceType"]


class synDeviceType(IntEnum):
    synDeviceGaudi = 1
    synDeviceGaudi2 = 4
    synDeviceGaudi3 = 5


def _get_device_type() -> synDeviceType:
    return synDeviceType.synDeviceGaudi2


def _is_fp16_supported() -> bool:
    return True
