// Runs an AOTInductor package on the images of a file, and saves the first output.
#include <fstream>
#include <iterator>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

int main(int, char **argv) {
  c10::InferenceMode mode;
  std::ifstream file(argv[2], std::ios::binary);
  std::vector<char> bytes((std::istreambuf_iterator<char>(file)), {});
  auto images = torch::pickle_load(bytes).toTensor();
  torch::inductor::AOTIModelPackageLoader loader(argv[1]);
  std::vector<at::Tensor> inputs = {images};
  auto pickled = torch::pickle_save(loader.run(inputs)[0]);
  std::ofstream(argv[3], std::ios::binary).write(pickled.data(), pickled.size());
}
