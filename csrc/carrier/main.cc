// The executable `epcomm-carrier`, which lies beside the library: all it does is in there.
extern "C" int epcomm_carrier_main();

int main() { return epcomm_carrier_main(); }
