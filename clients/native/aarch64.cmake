# For 64-bit ARM with Debian's cross compiler (g++-aarch64-linux-gnu):
#
#   cmake -S clients/native -B build/arm64 -DCMAKE_BUILD_TYPE=Release \
#     -DCMAKE_TOOLCHAIN_FILE=$PWD/clients/native/aarch64.cmake -DARM64=DIR -DLOLA_DEVICE=OFF \
#     -Dexecutorch_DIR=WHEEL/executorch/lib/cmake/executorch
#
# WHEEL is ExecuTorch's wheel for arm64, unpacked; DIR holds Debian's packages libssl-dev
# and libssl3 for arm64, unpacked with dpkg -x; nlohmann-json is the machine's own. It
# builds the runner alone: the device needs libcurl and protobuf for arm64, too.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_LIBRARY_ARCHITECTURE aarch64-linux-gnu)
set(CMAKE_TRY_COMPILE_PLATFORM_VARIABLES ARM64)

set(OPENSSL_INCLUDE_DIR "${ARM64}/usr/include" CACHE PATH "")
set(OPENSSL_CRYPTO_LIBRARY "${ARM64}/usr/lib/aarch64-linux-gnu/libcrypto.so" CACHE FILEPATH "")
set(CMAKE_CXX_STANDARD_INCLUDE_DIRECTORIES "${ARM64}/usr/include/aarch64-linux-gnu")
set(nlohmann_json_DIR "/usr/share/cmake/nlohmann_json" CACHE PATH "")
