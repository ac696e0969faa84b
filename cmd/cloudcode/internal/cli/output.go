package cli

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/spf13/cobra"
	"golang.org/x/term"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
)

const (
	formatTable = "table"
	formatJSON  = "json"
	formatName  = "name"
)

var formats = []string{formatTable, formatJSON, formatName}

func outputOf(cmd *cobra.Command) string { return flagString(cmd, "output") }

// jsonOf returns a message as the API's JSON, zero values included, in one line
// or indented. It is stable, which protojson's own white space is not.
func jsonOf(m proto.Message, indent bool) ([]byte, error) {
	raw, err := protojson.MarshalOptions{EmitDefaultValues: true}.Marshal(m)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	if indent {
		err = json.Indent(&out, raw, "", "  ")
	} else {
		err = json.Compact(&out, raw)
	}
	return out.Bytes(), err
}

func printJSON(w io.Writer, m proto.Message) error {
	out, err := jsonOf(m, true)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(w, "%s\n", out)
	return err
}

// printValueJSON prints what is no message of the API.
func printValueJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}

// printTable prints rows below a header, in columns.
func printTable(w io.Writer, header []string, rows [][]string) error {
	var buf bytes.Buffer
	tw := tabwriter.NewWriter(&buf, 0, 0, 3, ' ', 0)
	for _, row := range append([][]string{header}, rows...) {
		for i, cell := range row {
			if i > 0 {
				fmt.Fprint(tw, "\t")
			}
			if cell = plain(cell); cell == "" {
				cell = "-"
			}
			fmt.Fprint(tw, cell)
		}
		fmt.Fprintln(tw)
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	for line := range strings.Lines(buf.String()) {
		if _, err := fmt.Fprintln(w, strings.TrimRight(line, " \n")); err != nil {
			return err
		}
	}
	return nil
}

// field is a line of a description.
type field struct {
	name  string
	value string // may have several lines
}

// printFields prints a description, without the fields that are empty.
func printFields(w io.Writer, fields []field) error {
	width := 0
	for _, f := range fields {
		width = max(width, len(f.name)+1)
	}
	for _, f := range fields {
		if f.value == "" {
			continue
		}
		for i, line := range strings.Split(f.value, "\n") {
			name := ""
			if i == 0 {
				name = f.name + ":"
			}
			if _, err := fmt.Fprintf(w, "%-*s  %s\n", width, name, plain(line)); err != nil {
				return err
			}
		}
	}
	return nil
}

// escapes are terminal sequences: colours and cursor (CSI), titles and links (OSC).
var escapes = regexp.MustCompile("\x1b(\\[[0-?]*[ -/]*[@-~]|\\][^\x07\x1b]*(\x07|\x1b\\\\)?)")

// plain makes text from elsewhere harmless for a terminal: one line, without
// control characters.
func plain(s string) string {
	if strings.Contains(s, "\x1b") {
		s = escapes.ReplaceAllString(s, "")
	}
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t' || r == '\r':
			return ' '
		case unicode.IsControl(r) || unicode.Is(unicode.Bidi_Control, r):
			return -1
		}
		return r
	}, s)
}

// oneLine is plain without runs of spaces.
func oneLine(s string) string { return strings.Join(strings.Fields(plain(s)), " ") }

// shorten cuts s to n characters.
func shorten(s string, n int) string {
	r := []rune(s)
	if len(r) <= n {
		return s
	}
	return string(r[:max(n-1, 0)]) + "…"
}

// age is how long ago t was, as kubectl shows it; empty for no time.
func age(now time.Time, t *timestamppb.Timestamp) string {
	if !t.IsValid() || t.AsTime().IsZero() {
		return ""
	}
	return duration(now.Sub(t.AsTime()))
}

// duration is short: the two largest units while they matter.
func duration(d time.Duration) string {
	d = max(d, 0).Truncate(time.Second)
	s, m, h := int(d.Seconds()), int(d.Minutes()), int(d.Hours())
	switch {
	case s < 120:
		return fmt.Sprintf("%ds", s)
	case m < 10 && s%60 != 0:
		return fmt.Sprintf("%dm%ds", m, s%60)
	case m < 180:
		return fmt.Sprintf("%dm", m)
	case h < 8 && m%60 != 0:
		return fmt.Sprintf("%dh%dm", h, m%60)
	case h < 48:
		return fmt.Sprintf("%dh", h)
	case h < 8*24 && h%24 != 0:
		return fmt.Sprintf("%dd%dh", h/24, h%24)
	case h < 2*365*24:
		return fmt.Sprintf("%dd", h/24)
	}
	return fmt.Sprintf("%dy", h/24/365)
}

// timeAndAge is for descriptions.
func timeAndAge(now time.Time, t *timestamppb.Timestamp) string {
	a := age(now, t)
	if a == "" {
		return ""
	}
	return t.AsTime().UTC().Format(time.RFC3339) + " (" + a + " ago)"
}

// pairs shows a map as sorted k=v, with sep between them.
func pairs(m map[string]string, sep string) string {
	out := make([]string, 0, len(m))
	for k, v := range m {
		if v == "" {
			out = append(out, k)
		} else {
			out = append(out, k+"="+v)
		}
	}
	slices.Sort(out)
	return strings.Join(out, sep)
}

// screen is a terminal; tests have their own.
type screen interface {
	Width() int // columns, 0 if not known
}

type fileScreen struct{ *os.File }

func (s fileScreen) Width() int {
	w, _, err := term.GetSize(int(s.Fd()))
	if err != nil {
		return 0
	}
	return w
}

// screenOf returns the terminal that w (or r) is, or nil.
func screenOf(w any) screen {
	if s, ok := w.(screen); ok {
		return s
	}
	if f, ok := w.(*os.File); ok && term.IsTerminal(int(f.Fd())) && os.Getenv("TERM") != "dumb" {
		return fileScreen{f}
	}
	return nil
}

// style writes with colours, if w is a terminal and NO_COLOR is not set.
type style bool

func styleOf(w any) style { return style(screenOf(w) != nil && os.Getenv("NO_COLOR") == "") }

func (s style) paint(code, text string) string {
	if !s {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

func (s style) green(t string) string { return s.paint("32", t) }
func (s style) red(t string) string   { return s.paint("31", t) }
func (s style) dim(t string) string   { return s.paint("2", t) }
