package process

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Split splits a command line as a shell does, without expanding anything.
func Split(s string) ([]string, error) {
	var args []string
	var b strings.Builder
	var quote rune
	in, escaped := false, false
	for _, r := range s {
		switch {
		case escaped:
			// Between double quotes a backslash protects few characters.
			if quote == '"' && !strings.ContainsRune("\"\\$`", r) {
				b.WriteRune('\\')
			}
			b.WriteRune(r)
			escaped = false
		case r == '\\' && quote != '\'':
			escaped, in = true, true
		case quote != 0 && r == quote:
			quote = 0
		case quote != 0:
			b.WriteRune(r)
		case r == '\'' || r == '"':
			quote, in = r, true
		case r == ' ' || r == '\t' || r == '\n':
			if in {
				args = append(args, b.String())
				b.Reset()
				in = false
			}
		default:
			b.WriteRune(r)
			in = true
		}
	}
	if quote != 0 {
		return nil, fmt.Errorf("the quote %c is not closed", quote)
	}
	if escaped {
		return nil, errors.New("a backslash at the end")
	}
	if in {
		args = append(args, b.String())
	}
	return args, nil
}

// Flags that users may set. All else is refused: mounters run as root, with flags
// that read or write any file of the machine, open ports or take its credentials.
type Flags struct {
	Switches []string // take no value, or =true, =false
	Values   []string // take one
	Prefixes []string // families of Values
	// Bounds are of Values that are numbers. What is beyond is brought to the bound: it is
	// this machine's memory that they are taken from.
	Bounds map[string]Bound
}

// Bound of a number.
type Bound struct{ Min, Max int64 }

func (b Bound) of(name, value string) (string, error) {
	n, err := strconv.ParseInt(value, 10, 64)
	if err != nil && !errors.Is(err, strconv.ErrRange) { // out of range n is the nearest
		return "", fmt.Errorf("--%s needs a number", name)
	}
	return strconv.FormatInt(min(max(n, b.Min), b.Max), 10), nil
}

// Check splits a command line and returns its flags as --name or --name=value, so
// that nothing of it can be taken for anything else.
func (f Flags) Check(line string) ([]string, error) {
	args, err := Split(line)
	if err != nil {
		return nil, err
	}
	var out []string
	for i := 0; i < len(args); i++ {
		arg := args[i]
		if !strings.HasPrefix(arg, "-") || strings.Trim(arg, "-") == "" {
			return nil, fmt.Errorf("%q is no flag", arg)
		}
		name, value, has := strings.Cut(strings.TrimPrefix(strings.TrimPrefix(arg, "-"), "-"), "=")
		switch {
		case slices.Contains(f.Switches, name):
			if has && value != "true" && value != "false" {
				return nil, fmt.Errorf("--%s takes no value", name)
			}
		case slices.Contains(f.Values, name) || slices.ContainsFunc(f.Prefixes, func(p string) bool { return strings.HasPrefix(name, p) }):
			if !has {
				if i++; i == len(args) {
					return nil, fmt.Errorf("--%s needs a value", name)
				}
				value, has = args[i], true
			}
		default:
			return nil, fmt.Errorf("--%s is not among the flags that may be set", name)
		}
		if b, ok := f.Bounds[name]; ok {
			if value, err = b.of(name, value); err != nil {
				return nil, err
			}
		}
		arg = "--" + name
		if has {
			arg += "=" + value
		}
		out = append(out, arg)
	}
	return out, nil
}
