package cli

import (
	"errors"
	"fmt"
	"math/big"
	"strconv"
	"strings"
)

// parseCPU reads `1.5`, `2` or `1500m` and returns thousandths of a CPU. What
// is finer than a thousandth is refused rather than rounded.
func parseCPU(s string) (int64, error) {
	number, milli := strings.CutSuffix(s, "m")
	scale := int64(1000)
	if milli {
		scale = 1
	}
	v, err := parseScaled(number, big.NewInt(scale))
	if err != nil {
		return 0, fmt.Errorf("%q: %w; want CPUs such as 1.5 or 1500m", s, err)
	}
	return v, nil
}

var byteUnits = map[string]int64{
	"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15,
	"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40, "Pi": 1 << 50,
}

// parseBytes reads `2Gi`, `512M`, `1.5Gi` or plain bytes, as in Kubernetes; a B
// behind it (`2GiB`) and a capital K are fine.
func parseBytes(s string) (int64, error) {
	const want = "want a size such as 2Gi, 512M or plain bytes"
	end := strings.LastIndexAny(s, "0123456789.") + 1
	number, unit := s[:end], strings.TrimSpace(s[end:])
	if unit != "B" {
		unit = strings.TrimSuffix(unit, "B")
	} else {
		unit = ""
	}
	if strings.HasPrefix(unit, "K") && unit != "Ki" {
		unit = "k" + unit[1:]
	}
	scale, ok := byteUnits[unit]
	if !ok {
		return 0, fmt.Errorf("%q: unknown unit %q; %s", s, unit, want)
	}
	v, err := parseScaled(number, big.NewInt(scale))
	if err != nil {
		return 0, fmt.Errorf("%q: %w; %s", s, err, want)
	}
	return v, nil
}

// parseScaled returns number × scale, which must be a whole number that is not
// negative. It is exact: no floating point.
func parseScaled(number string, scale *big.Int) (int64, error) {
	whole, fraction, _ := strings.Cut(number, ".")
	if len(number) > 40 || whole == "" && fraction == "" || strings.Trim(whole+fraction, "0123456789") != "" {
		return 0, errors.New("not a number")
	}
	r, ok := new(big.Rat).SetString("0" + whole + "." + fraction + "0")
	if !ok {
		return 0, errors.New("not a number")
	}
	r.Mul(r, new(big.Rat).SetInt(scale))
	if !r.IsInt() {
		return 0, errors.New("too fine")
	}
	if !r.Num().IsInt64() {
		return 0, errors.New("too large")
	}
	return r.Num().Int64(), nil
}

// quantity is a flag's value; it is shown as it was given.
type quantity struct {
	parse func(string) (int64, error)
	kind  string
	value int64
	text  string
}

func (q *quantity) String() string { return q.text }
func (q *quantity) Type() string   { return q.kind }
func (q *quantity) Set(s string) error {
	v, err := q.parse(s)
	if err != nil {
		return err
	}
	q.value, q.text = v, s
	return nil
}

// formatCPU is the inverse of parseCPU; empty for no limit.
func formatCPU(millis int64) string {
	switch {
	case millis == 0:
		return ""
	case millis%1000 == 0:
		return strconv.FormatInt(millis/1000, 10)
	}
	return strings.TrimRight(fmt.Sprintf("%d.%03d", millis/1000, millis%1000), "0")
}

// formatBytes is for people: three digits at most, and a unit.
func formatBytes(n int64) string {
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	units := []string{"KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}
	v, i := float64(n)/1024, 0
	for v >= 999.5 && i < len(units)-1 {
		v, i = v/1024, i+1
	}
	if v < 9.95 {
		return strings.TrimSuffix(fmt.Sprintf("%.1f", v), ".0") + " " + units[i]
	}
	return fmt.Sprintf("%.0f %s", v, units[i])
}
