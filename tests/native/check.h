// Named tests in one program: `program NAME` runs one of them.
#pragma once

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <map>
#include <stdexcept>
#include <string>

inline std::map<std::string, void (*)()>& tests() {
    static std::map<std::string, void (*)()> all;
    return all;
}

struct Test {
    Test(const char* name, void (*run)()) { tests()[name] = run; }
};

/// What a call that must be refused throws; empty: it was not.
template <class Call>
std::string refusal(const Call& call) {
    try {
        call();
    } catch (const std::runtime_error& error) {
        return error.what();
    }
    return "";
}

inline bool has(const std::string& text, const std::string& part) {
    return text.find(part) != std::string::npos;
}

#define TEST(name)                              \
    static void name();                         \
    static const Test name##_test(#name, name); \
    static void name()

#define CHECK(condition)                                                            \
    do {                                                                            \
        if (!(condition)) {                                                         \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
            fflush(stderr);                                                         \
            _Exit(1);                                                               \
        }                                                                           \
    } while (0)

#define CHECK_EQUAL(a, b)                                                                          \
    do {                                                                                           \
        const auto seen_ = (unsigned long long)(a), expected_ = (unsigned long long)(b);           \
        if (seen_ != expected_) {                                                                  \
            fprintf(stderr, "%s:%d: %s is %llu (0x%llx), not %llu (0x%llx)\n", __FILE__, __LINE__, \
                    #a, seen_, seen_, expected_, expected_);                                       \
            fflush(stderr);                                                                        \
            _Exit(1);                                                                              \
        }                                                                                          \
    } while (0)

int main(int count, char** arguments) {
    const auto found = tests().find(count > 1 ? arguments[1] : "");
    if (found == tests().end()) return 2;
    found->second();
    return 0;
}
