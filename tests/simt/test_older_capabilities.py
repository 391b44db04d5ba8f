"""The kernels compiled for capability 6.1 and 7.0, which nvcc of CUDA 13 has dropped and NVRTC of CUDA 12 still serves.

NVRTC comes from the package nvidia-cuda-nvrtc-cu12, CUDA's own headers from the toolkit that nvcc belongs to. There is
no standard library for NVRTC: the few names that kernels take from it are written here.
"""

import ctypes
import importlib.util
from collections.abc import Callable
from pathlib import Path

import kernel_build
import pytest
from kernel_build import INCLUDE_DIRS

from build_support.settings import Unavailable

STANDARD_LIBRARY = {
    "cmath": """
        #pragma once
        #define INFINITY __int_as_float(0x7f800000)
        """,
    "cstdint": """
        #pragma once
        typedef signed char int8_t; typedef short int16_t; typedef int int32_t; typedef long long int64_t;
        typedef unsigned char uint8_t; typedef unsigned short uint16_t; typedef unsigned uint32_t;
        typedef unsigned long long uint64_t; typedef unsigned long long uintptr_t;
        """,
    "cstring": "",
    "type_traits": """
        #pragma once
        namespace std {
        template <class T, class U> constexpr bool is_same_v = false;
        template <class T> constexpr bool is_same_v<T, T> = true;
        template <bool kFirst, class T, class U> struct conditional { using type = T; };
        template <class T, class U> struct conditional<false, T, U> { using type = U; };
        template <class T, T kValue> struct integral_constant {
          static constexpr T value = kValue;
          __host__ __device__ constexpr operator T() const { return kValue; }
        };
        template <bool kFirst, class T, class U> using conditional_t = typename conditional<kFirst, T, U>::type;
        }
        """,
}

# nvcc includes <cmath> by itself.
ATTENTION = """
        #include <cmath>
        #include "fastsam/attention_attend.cuh"
        #include "fastsam/attention_finish.cuh"
        #include "fastsam/attention_gates.cuh"
        namespace fastsam::cuda {
        #define FORWARD(S, Way, KeyWarps, Group)                                               \\
          template __global__ void attention_forward_kernel<S, Way, KeyWarps, Group>(          \\
              AttentionForwardArguments<S>, ForwardStages);                                    \\
          template __global__ void attention_gates_forward_kernel<S, Way, KeyWarps, Group>(    \\
              AttentionGatesArguments<S>, ForwardStages);
        #define BACKWARD(S, Way, KeyWarps, Group)                                              \\
          template __global__ void attention_backward_prepare_kernel<S, Way, KeyWarps>(        \\
              AttentionBackwardArguments<S, Way>);                                             \\
          template __global__ void attention_backward_attend_kernel<S, Way, KeyWarps, Group>(  \\
              AttentionBackwardArguments<S, Way>, BackwardStages);                             \\
          template __global__ void attention_backward_finish_kernel<S, Way, KeyWarps>(         \\
              AttentionBackwardArguments<S, Way>, AttentionSums<Way::Accumulator>, int64_t);
"""

KERNELS = {
    "vocabulary": """
        #include "fastsam/ptx.cuh"
        using namespace fastsam::cuda;
        __global__ void copy(Global<const float> x, Global<float> y) {
          FASTSAM_SHARED(float, tile, 128);
          cp_async<16>(tile + 4 * threadIdx.x, x + 4 * threadIdx.x);
          cp_async_wait<0>();
          bar_sync(1, 32);
          store(y + 4 * threadIdx.x, load<float4>(tile + 4 * (31 - threadIdx.x)));
        }
        """,
    "lstm_gates": """
        #include "fastsam/lstm_gates.cuh"
        #include "fastsam/lstm_gates_backward.cuh"
        namespace fastsam::cuda {
        template __global__ void lstm_moments_kernel<float, 4>(
            LstmInputs<float>, LstmSplit, int, Global<Moments<float>>);
        template __global__ void lstm_moments_kernel<double, 2>(
            LstmInputs<double>, LstmSplit, int, Global<Moments<double>>);
        #define KERNELS(U)                                                                                  \\
          template __global__ void lstm_gates_forward_kernel<U, float, 4, NormWeights::kChannel>(           \\
              LstmForwardArguments<float>);                                                                 \\
          template __global__ void lstm_gates_forward_kernel<U, __half, 8, NormWeights::kNone>(             \\
              LstmForwardArguments<__half>);                                                                \\
          template __global__ void lstm_gates_forward_kernel<U, double, 2, NormWeights::kPosition>(         \\
              LstmForwardArguments<double>);                                                                \\
          template __global__ void lstm_gates_backward_kernel<U, float, 4, NormWeights::kChannel>(          \\
              LstmBackwardArguments<float>);                                                                \\
          template __global__ void lstm_gates_backward_kernel<U, __nv_bfloat16, 4, NormWeights::kPosition>( \\
              LstmBackwardArguments<__nv_bfloat16>);                                                        \\
          template __global__ void lstm_gates_backward_kernel<U, double, 2, NormWeights::kNone>(            \\
              LstmBackwardArguments<double>);
        KERNELS(Update::kLstm)
        KERNELS(Update::kMemory)
        KERNELS(Update::kProduct)
        template __global__ void lstm_norm_backward_kernel<float, 4, NormWeights::kPosition>(LstmNormArguments<float>);
        template __global__ void lstm_norm_backward_kernel<double, 2, NormWeights::kChannel>(LstmNormArguments<double>);
        }
        """,
    "separable_gates": """
        #include "fastsam/separable_gates_channels.cuh"
        namespace fastsam::cuda {
        #define OF_TILES(S, T, Columns)                                                              \\
          template __global__ void separable_gates_forward_kernel<S, FmaProduct<T, Columns>>(        \\
              GateInputs<S>, int, Global<S>, Global<S>);                                             \\
          template __global__ void separable_gates_backward_gates_kernel<S, FmaProduct<T, Columns>>( \\
              GateInputs<S>, int, GateOutputGradients<S>, Global<S>, GateWorkspace<T, T>);
        #define OF_SUMS(S, T)                                                                      \\
          template __global__ void separable_gates_backward_products_kernel<S, FmaProduct<T, 64>>( \\
              GateInputs<S>, GateProducts, GateWorkspace<T, T>, GateInputGradients<S>);            \\
          template __global__ void separable_gates_backward_channels_kernel<S, T>(                 \\
              GateInputs<S>, GateChannels, int64_t, GateWorkspace<T, T>, GateInputGradients<S>,    \\
              GateWeightGradients<S>);
        OF_TILES(float, float, 64)
        OF_TILES(__half, float, 32)
        OF_TILES(double, double, 64)
        OF_SUMS(float, float)
        OF_SUMS(__nv_bfloat16, float)
        OF_SUMS(double, double)
        }
        """,
    "attention": f"""{ATTENTION}
        FORWARD(float, WarpFma<float>, 1, 64)
        FORWARD(__half, WarpFma<float>, 4, 64)
        BACKWARD(float, WarpFma<float>, 1, 64)
        }}
        """,
    "attention_of_many_channels": f"""{ATTENTION}
        FORWARD(float, WarpFma<float>, 1, 128)
        FORWARD(__nv_bfloat16, WarpFma<float>, 4, 128)
        BACKWARD(float, WarpFma<float>, 1, 128)
        BACKWARD(__half, WarpFma<float>, 4, 128)
        }}
        """,
    "attention_in_double": f"""{ATTENTION}
        FORWARD(double, WarpFma<double>, 4, 32)
        BACKWARD(double, WarpFma<double>, 4, 64)
        }}
        """,
}


class Compiler:
    """NVRTC, with the folders where headers are."""

    def __init__(self, library: Path, include_dirs: tuple[Path, ...]) -> None:
        self._library = ctypes.CDLL(str(library))
        self._include_dirs = include_dirs

    def compile(self, source: str, capability: int) -> int:
        """Compile kernels to machine code; its size in bytes.

        Raises:
            RuntimeError: what the compiler complained about.
        """
        program = ctypes.c_void_p()
        self._check(self._library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, 0, 0))
        options = [f"--gpu-architecture=sm_{capability}", "--std=c++17", "--device-as-default-execution-space"]
        options += [f"--include-path={folder}" for folder in self._include_dirs]
        encoded = (ctypes.c_char_p * len(options))(*map(str.encode, options))
        if self._library.nvrtcCompileProgram(program, len(options), encoded) != 0:
            raise RuntimeError(self._log(program))
        size = ctypes.c_size_t()
        self._check(self._library.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        return size.value

    def _log(self, program: ctypes.c_void_p) -> str:
        size = ctypes.c_size_t()
        self._check(self._library.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
        text = ctypes.create_string_buffer(size.value)
        self._check(self._library.nvrtcGetProgramLog(program, text))
        return text.value.decode()

    def _check(self, status: int) -> None:
        assert status == 0, f"NVRTC status {status}"


@pytest.fixture(scope="module")
def compile_kernels(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], int]:
    package = importlib.util.find_spec("nvidia")
    folders = [Path(path) for path in (package.submodule_search_locations or [])] if package is not None else []
    library = next((path for folder in folders for path in folder.glob("cuda_nvrtc/lib/libnvrtc.so.12")), None)
    if library is None:
        pytest.skip("no NVRTC of CUDA 12: the package nvidia-cuda-nvrtc-cu12 is not installed")
    try:
        toolkit = [Path(folder).parent / "include" for folder in kernel_build.device_compiler().library_dirs]
    except Unavailable as reason:
        pytest.skip(f"no headers of CUDA: {reason}")
    standard = tmp_path_factory.mktemp("standard")
    for name, text in STANDARD_LIBRARY.items():
        (standard / name).write_text(text)
    return Compiler(library, (standard, *INCLUDE_DIRS, *toolkit)).compile


@pytest.mark.parametrize("capability", [61, 70])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile(compile_kernels: Callable[[str, int], int], name: str, capability: int) -> None:
    assert compile_kernels(KERNELS[name], capability) > 1000


def test_what_does_not_compile_is_seen(compile_kernels: Callable[[str, int], int]) -> None:
    with pytest.raises(RuntimeError, match="unknown"):
        compile_kernels('#include "fastsam/ptx.cuh"\n__global__ void f(float* x) { x[0] = unknown; }', 61)
