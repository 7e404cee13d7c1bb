// Weights in pages of 2 MB. Read once a step from first to last, pages of 4 kB cost more than half of the bandwidth
// where the system runs in a virtual machine, and some of it elsewhere: the processor looks up every one of them.
//
// https://docs.kernel.org/admin-guide/mm/transhuge.html
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <memory>
#include <mutex>
#include <string>

namespace huge_pages {

constexpr size_t kPage = size_t{1} << 21, kRegion = size_t{1} << 25, kAlignment = 64;

inline size_t rounded_up(size_t bytes, size_t multiple) { return (bytes + multiple - 1) / multiple * multiple; }

// Whether the system gives such pages to who asks for them.
inline bool offered() {
    std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");
    std::string choices;
    return std::getline(file, choices) && choices.find("[never]") == std::string::npos;
}

// Memory that is filled from its beginning and given back as a whole.
class Region {
public:
    explicit Region(size_t bytes) : size_(rounded_up(std::max(bytes, kRegion), kPage) + kPage) {
        void* mapped = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (mapped == MAP_FAILED) return;
        memory_ = static_cast<uint8_t*>(mapped);
        free_ = rounded_up(reinterpret_cast<uintptr_t>(mapped), kPage) - reinterpret_cast<uintptr_t>(mapped);
        madvise(memory_ + free_, size_ - kPage, MADV_HUGEPAGE);
    }
    ~Region() {
        if (memory_ != nullptr) munmap(memory_, size_);
    }
    Region(const Region&) = delete;
    Region& operator=(const Region&) = delete;

    // Return room for so many bytes, or null.
    uint8_t* take(size_t bytes) {
        if (memory_ == nullptr || free_ + bytes > size_) return nullptr;
        uint8_t* taken = memory_ + free_;
        free_ += rounded_up(bytes, kAlignment);
        return taken;
    }

private:
    size_t size_, free_ = 0;
    uint8_t* memory_ = nullptr;
};

// Weights, copied into huge pages where there are any; else where they were.
class Copy {
public:
    Copy() = default;
    Copy(const void* data, size_t bytes) : data_(data) {
        static const bool possible = offered();
        if (!possible || bytes == 0) return;
        static std::mutex taking;
        static std::weak_ptr<Region> last;
        const std::lock_guard<std::mutex> lock(taking);
        region_ = last.lock();
        uint8_t* room = region_ ? region_->take(bytes) : nullptr;
        if (room == nullptr) {
            last = region_ = std::make_shared<Region>(bytes);
            room = region_->take(bytes);
        }
        if (room != nullptr) data_ = std::memcpy(room, data, bytes);
    }

    template <typename Element>
    const Element* as() const {
        return static_cast<const Element*>(data_);
    }

private:
    const void* data_ = nullptr;
    std::shared_ptr<Region> region_;  // of all whose bytes are in it
};

}  // namespace huge_pages
