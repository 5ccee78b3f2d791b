// Memory of large tensors in blocks that are kept when a tensor goes and used again for the next of about its size.
//
// A micro-batch keeps hundreds of activations of a few sizes, and the next one those of other sizes. In glibc's heap
// the holes of one do not fit the other's. Blocks of their own, straight from
// the system, have no neighbours. They are kept so that pages need not be cleared and mapped anew, and never more of
// them than were once in use together.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>

#include <cstdint>
#include <iterator>
#include <map>
#include <mutex>
#include <unordered_map>

namespace {

constexpr size_t large = 1 << 17, step = 1 << 12;  // bytes
constexpr double wider = 1.5;                      // how much larger than asked a block may be
constexpr uint8_t priority = 1;

std::mutex guard;
// Never destroyed: PyTorch has tensors that go after this library has.
auto& blocks = *new std::unordered_map<void*, size_t>;  // all, by address
auto& idle = *new std::multimap<size_t, void*>;         // those of them that no tensor has, by size
size_t held = 0, used = 0, most = 0;                    // bytes of all, of those in use, of those once in use together
c10::Allocator* before = nullptr;
bool on = false;

void drop(std::multimap<size_t, void*>::iterator one) {
  munmap(one->second, one->first);
  held -= one->first;
  blocks.erase(one->second);
  idle.erase(one);
}

void drop_all() {
  while (!idle.empty()) drop(idle.begin());
}

void* map(size_t size) {
  void* place = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (place == MAP_FAILED && !idle.empty()) {
    drop_all();
    place = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  }
  return place == MAP_FAILED ? nullptr : place;
}

// A block of at least so many bytes: an idle one that is no more than `wider` as large; else an idle one that is a
// little smaller, grown, which keeps its pages; else a new one. Null where the system has no more.
void* take(size_t asked) {
  size_t size = (asked + step - 1) / step * step;
  std::lock_guard<std::mutex> lock(guard);
  void* place = nullptr;
  auto fitting = idle.lower_bound(size);
  if (fitting != idle.end() && fitting->first <= size * wider) {
    size = fitting->first;
    place = fitting->second;
    idle.erase(fitting);
  } else if (fitting != idle.begin() && std::prev(fitting)->first * wider >= size) {
    auto [smaller, old] = *std::prev(fitting);
    void* moved = mremap(old, smaller, size, MREMAP_MAYMOVE);
    if (moved != MAP_FAILED) {
      idle.erase(std::prev(fitting));
      blocks.erase(old);
      blocks[moved] = size;
      held += size - smaller;
      place = moved;
    }
  }
  if (!place) {
    place = map(size);
    if (!place) return nullptr;
    blocks[place] = size;
    held += size;
  }
  used += size;
  if (used > most) most = used;
  while (held > most && !idle.empty()) drop(idle.begin());
  return place;
}

void give_back(void* place) {
  if (!place) return;
  {
    std::lock_guard<std::mutex> lock(guard);
    auto block = blocks.find(place);
    if (block != blocks.end()) {
      used -= block->second;
      auto one = idle.emplace(block->second, place);
      if (!on) drop(one);
      return;
    }
  }
  before->raw_deallocate(place);
}

struct Blocks final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* place = size >= large ? take(size) : nullptr;
    if (!place) place = before->raw_allocate(size);  // which raises what PyTorch raises
    return {place, place, &give_back, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, std::size_t size) const override { default_copy_data(to, from, size); }
};

}  // namespace

// Whether it was off.
extern "C" int32_t blocks_on() {
  static Blocks ours;
  std::lock_guard<std::mutex> lock(guard);
  if (on) return 0;
  if (!before) before = c10::GetCPUAllocator();
  most = used;
  on = true;
  c10::SetCPUAllocator(&ours, priority);
  return 1;
}

// Tensors that have blocks keep them, until they go.
extern "C" void blocks_off() {
  std::lock_guard<std::mutex> lock(guard);
  on = false;
  c10::SetCPUAllocator(before, priority);
  drop_all();
}

extern "C" void blocks_let_go() {
  std::lock_guard<std::mutex> lock(guard);
  drop_all();
}

extern "C" void blocks_bytes(int64_t* held_used_most) {
  std::lock_guard<std::mutex> lock(guard);
  held_used_most[0] = held;
  held_used_most[1] = used;
  held_used_most[2] = most;
}
