// Executes the instructions of AMX on a processor without them, for the machine code of the instruction
// set `amx`. Such a processor raises SIGILL. The handler decodes the instruction, does what Intel's
// manual says (Software Developer's Manual, volume 2), and goes on behind it. What a real unit would
// refuse ends the program. Where buffers have guards, the handler's loads and stores meet them too.
#include <immintrin.h>
#include <signal.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

constexpr int tile_count = 8, most_rows = 16, most_bytes = 64, most_words = 16;

struct Tile {
  int rows, row_bytes;
  std::uint32_t words[most_rows][most_words];  // 0 behind the bytes of a row
};

struct Unit {
  bool configured;
  Tile tiles[tile_count];
};

thread_local Unit unit;

[[noreturn]] void refuse(const char* reason) {
  std::fprintf(stderr, "the matrix unit refuses: %s\n", reason);
  std::abort();
}

// An instruction with a VEX prefix of three bytes, and the registers of the thread at it.
class Instruction {
 public:
  explicit Instruction(greg_t* registers)
      : registers_(registers), code_(reinterpret_cast<const std::uint8_t*>(registers[REG_RIP])) {}

  bool is_of_amx() const {
    const bool vex_of_map_2 = code_[0] == 0xc4 && (code_[1] & 31) == 2;
    const bool w_and_l_are_zero = (code_[2] & 0x84) == 0;
    return vex_of_map_2 && w_and_l_are_zero &&
           (opcode() == 0x49 || opcode() == 0x4b || opcode() == 0x5c);
  }

  int opcode() const { return code_[3]; }
  int prefix() const { return code_[2] & 3; }  // 0: none, 1: 66, 2: F3, 3: F2
  int third() const { return ~code_[2] >> 3 & 15; }
  bool has_memory() const { return code_[4] >> 6 != 3; }
  int reg() const { return code_[4] >> 3 & 7; }
  int rm() const { return code_[4] & 7; }

  // The address of the memory operand without its index register, and that register, scaled.
  struct Address {
    std::uint8_t* begin;
    std::int64_t stride;
  };

  // Moves the thread behind the instruction.
  Address pass() {
    const std::uint8_t* next = code_ + 5;
    std::int64_t address = 0, stride = 0;
    if (has_memory()) {
      const int mode = code_[4] >> 6;
      int base = rm();
      if (base == 4) {
        const int sib = *next++, index = (sib >> 3 & 7) | (code_[1] & 0x40 ? 0 : 8);
        base = sib & 7;
        if (index != 4) stride = general(index) << (sib >> 6);
      }
      const bool no_base = mode == 0 && base == 5;
      if (!no_base) address = general(base | (code_[1] & 0x20 ? 0 : 8));
      if (mode == 1) address += static_cast<std::int8_t>(*next++);
      if (mode == 2 || no_base) {
        std::int32_t displacement;
        std::memcpy(&displacement, next, 4);
        next += 4;
        address += displacement;
        if (no_base && rm() == 5) address += reinterpret_cast<std::int64_t>(next);
      }
    }
    registers_[REG_RIP] = reinterpret_cast<greg_t>(next);
    return {reinterpret_cast<std::uint8_t*>(address), stride};
  }

 private:
  std::int64_t general(int number) const {
    static constexpr int names[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                    REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                    REG_R12, REG_R13, REG_R14, REG_R15};
    return registers_[names[number]];
  }

  greg_t* registers_;
  const std::uint8_t* code_;
};

void configure(const std::uint8_t* config) {
  if (config[0] != 1) refuse("the palette is not 1");
  if (config[1] != 0) refuse("the configuration starts at a row other than 0");
  for (int i = 2; i < 16; ++i)
    if (config[i] != 0) refuse("a reserved byte of the configuration is not 0");
  for (int i = 0; i < 16; ++i) {
    std::uint16_t row_bytes;
    std::memcpy(&row_bytes, config + 16 + 2 * i, 2);
    const int rows = config[48 + i];
    if (i >= tile_count ? row_bytes != 0 || rows != 0 : row_bytes > most_bytes || rows > most_rows)
      refuse("the configuration names a tile that is too large, or does not exist");
    if ((row_bytes == 0) != (rows == 0)) refuse("a tile has rows without bytes, or bytes without rows");
    if (i < tile_count) unit.tiles[i] = {rows, row_bytes, {}};
  }
  unit.configured = true;
}

Tile& tile(int number) {
  if (number >= tile_count) refuse("the number of a tile is above 7");
  if (!unit.configured) refuse("no tile is configured");
  if (unit.tiles[number].rows == 0) refuse("the configuration does not have this tile");
  return unit.tiles[number];
}

// A word has two numbers of bfloat16: the first in its lower half.
float first(std::uint32_t word) { return __builtin_bit_cast(float, word << 16); }
float second(std::uint32_t word) { return __builtin_bit_cast(float, word & 0xffff0000); }

// TDPBF16PS. The sums of products at even and odd k run apart, from zero.
void multiply(Tile& sums, const Tile& a, const Tile& b) {
  if (sums.rows != a.rows || sums.row_bytes != b.row_bytes || a.row_bytes != 4 * b.rows)
    refuse("the sizes of three tiles do not fit each other");
  for (int m = 0; m < a.rows; ++m) {
    float even[most_words] = {}, odd[most_words] = {};
    for (int k = 0; k < b.rows; ++k)
      for (int n = 0; n < most_words; ++n) {
        even[n] = __builtin_fmaf(first(a.words[m][k]), first(b.words[k][n]), even[n]);
        odd[n] = __builtin_fmaf(second(a.words[m][k]), second(b.words[k][n]), odd[n]);
      }
    for (int n = 0; n < most_words; ++n)
      sums.words[m][n] = __builtin_bit_cast(
          std::uint32_t, __builtin_bit_cast(float, sums.words[m][n]) + (even[n] + odd[n]));
  }
}

void on_illegal_instruction(int, siginfo_t*, void* context) {
  Instruction instruction(static_cast<ucontext_t*>(context)->uc_mcontext.gregs);
  if (!instruction.is_of_amx()) {
    signal(SIGILL, SIG_DFL);  // the instruction runs again, and ends the program
    return;
  }
  _mm_setcsr(_mm_getcsr() | 0x8040);  // the unit takes denormal numbers for zero
  const auto [begin, stride] = instruction.pass();
  const bool memory = instruction.has_memory();
  switch (instruction.opcode() << 4 | instruction.prefix() << 1 | memory) {
    case 0x491:  // LDTILECFG
      configure(begin);
      return;
    case 0x490:  // TILERELEASE
      unit = {};
      return;
    case 0x496: {  // TILEZERO
      Tile& to = tile(instruction.reg());
      std::memset(to.words, 0, sizeof to.words);
      return;
    }
    case 0x4b7: {  // TILELOADD
      Tile& to = tile(instruction.reg());
      std::memset(to.words, 0, sizeof to.words);
      for (int r = 0; r < to.rows; ++r) std::memcpy(to.words[r], begin + r * stride, to.row_bytes);
      return;
    }
    case 0x4b5: {  // TILESTORED
      const Tile& from = tile(instruction.reg());
      for (int r = 0; r < from.rows; ++r)
        std::memcpy(begin + r * stride, from.words[r], from.row_bytes);
      return;
    }
    case 0x5c4: {  // TDPBF16PS
      const int a = instruction.rm(), b = instruction.third(), sums = instruction.reg();
      if (a == b || a == sums || b == sums) refuse("two of three tiles are the same");
      multiply(tile(sums), tile(a), tile(b));
      return;
    }
    default:
      refuse("the instruction is not one that this emulation knows");
  }
}

[[gnu::constructor]] void handle_illegal_instructions() {
  struct sigaction action{};
  action.sa_sigaction = on_illegal_instruction;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, nullptr);
}

}  // namespace
