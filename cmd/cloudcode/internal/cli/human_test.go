package cli

import (
	"math"
	"strings"
	"testing"
	"time"
	"unicode"

	"google.golang.org/protobuf/types/known/timestamppb"
)

func TestParseCPU(t *testing.T) {
	for in, want := range map[string]int64{
		"1": 1000, "1.5": 1500, "1500m": 1500, "0": 0, "0.001": 1, ".5": 500, "2.": 2000, "1.5000": 1500, "250m": 250,
	} {
		if have, err := parseCPU(in); err != nil || have != want {
			t.Errorf("parseCPU(%q) = %d, %v; want %d", in, have, err, want)
		}
	}
	for _, in := range []string{"", "m", "-1", "+1", "1.5m", "0.0001", "1e3", "1,5", "one", "1 ", "0x10", ".", "9223372036854775807", strings.Repeat("9", 100)} {
		if have, err := parseCPU(in); err == nil {
			t.Errorf("parseCPU(%q) = %d, want an error", in, have)
		}
	}
}

func TestParseBytes(t *testing.T) {
	for in, want := range map[string]int64{
		"0": 0, "1024": 1024, "2Gi": 2 << 30, "2GiB": 2 << 30, "512M": 512e6, "512MB": 512e6, "1.5Gi": 3 << 29,
		"10k": 10e3, "10K": 10e3, "10KB": 10e3, "4Ki": 4096, "1T": 1e12, "1Ti": 1 << 40, "1Pi": 1 << 50, "7B": 7, "2 Gi": 2 << 30,
	} {
		if have, err := parseBytes(in); err != nil || have != want {
			t.Errorf("parseBytes(%q) = %d, %v; want %d", in, have, err, want)
		}
	}
	for _, in := range []string{"", "Gi", "-1", "1.5", "0.1Ki", "1g", "1gib", "2Zi", "1e9", "8193Pi", "1..5Gi", "1Gi2"} {
		if have, err := parseBytes(in); err == nil {
			t.Errorf("parseBytes(%q) = %d, want an error", in, have)
		}
	}
}

func FuzzQuantities(f *testing.F) {
	for _, s := range []string{"1.5", "1500m", "2Gi", "", "1..", "999999999999999999999", "0.1k"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if v, err := parseCPU(s); err == nil {
			if v < 0 {
				t.Errorf("parseCPU(%q) = %d", s, v)
			}
			// What is shown means the same.
			if shown := formatCPU(v); v != 0 {
				if again, err := parseCPU(shown); err != nil || again != v {
					t.Errorf("parseCPU(%q) = %d is shown as %q, which is %d, %v", s, v, shown, again, err)
				}
			}
		} else if strings.ContainsFunc(err.Error(), unicode.IsControl) {
			t.Errorf("control characters in %q", err)
		}
		if v, err := parseBytes(s); err == nil && v < 0 {
			t.Errorf("parseBytes(%q) = %d", s, v)
		}
	})
}

func TestFormatBytes(t *testing.T) {
	for in, want := range map[int64]string{
		0: "0 B", 1023: "1023 B", 1024: "1 KiB", 1536: "1.5 KiB", 2 << 30: "2 GiB", 155 << 20: "155 MiB",
		1023<<20 + 1023<<10: "1 GiB", math.MaxInt64: "8 EiB", 10<<20 + 1<<19: "10 MiB",
	} {
		if have := formatBytes(in); have != want {
			t.Errorf("formatBytes(%d) = %q, want %q", in, have, want)
		}
	}
}

func TestAge(t *testing.T) {
	for in, want := range map[time.Duration]string{
		-time.Hour: "0s", 0: "0s", 119 * time.Second: "119s", 2 * time.Minute: "2m", 150 * time.Second: "2m30s", 59 * time.Minute: "59m",
		179 * time.Minute: "179m", 3 * time.Hour: "3h", 200 * time.Minute: "3h20m", 26 * time.Hour: "26h", 50 * time.Hour: "2d2h",
		72 * time.Hour: "3d", 30 * 24 * time.Hour: "30d", 800 * 24 * time.Hour: "2y",
	} {
		if have := age(testNow, timestamppb.New(testNow.Add(-in))); have != want {
			t.Errorf("age %s = %q, want %q", in, have, want)
		}
	}
	if have := age(testNow, nil); have != "" {
		t.Errorf("no time = %q", have)
	}
}

func TestPlain(t *testing.T) {
	for in, want := range map[string]string{
		"a\nb\tc": "a b c", "\x1b[31mred\x1b[0m": "red", "\x1b]0;title\x07x": "x", "\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\": "link",
		"\x00\x7f\u009b31m\u202eevil": "31mevil", "grüße ✓": "grüße ✓", "\x1b": "", "\x1b]never ends": "",
	} {
		if have := plain(in); have != want {
			t.Errorf("plain(%q) = %q, want %q", in, have, want)
		}
	}
}
