package gateway

import (
	"bytes"
	"strings"
	"testing"
)

// parseFrames reads a stream as the HTML standard says.
func parseFrames(s string) (out []frame) {
	s = strings.NewReplacer("\r\n", "\n", "\r", "\n").Replace(s)
	var f frame
	var data []string
	for line := range strings.SplitSeq(s, "\n") {
		name, value, _ := strings.Cut(line, ":")
		value = strings.TrimPrefix(value, " ")
		switch {
		case line == "":
			if data != nil {
				f.data = []byte(strings.Join(data, "\n"))
				out = append(out, f)
			}
			f, data = frame{}, nil
		case name == "id":
			f.id = value
		case name == "event":
			f.event = value
		case name == "data":
			data = append(data, value)
		}
	}
	return out
}

func TestFrames(t *testing.T) {
	for _, c := range []struct {
		f    frame
		want string
	}{
		{frame{id: "1-2", event: "opencode", data: []byte(`{"a":1}`)}, "id: 1-2\nevent: opencode\ndata: {\"a\":1}\n\n"},
		{frame{event: "heartbeat", data: []byte("{}")}, "event: heartbeat\ndata: {}\n\n"},
		{frame{data: []byte("a\nb\r\nc\rd")}, "data: a\ndata: b\ndata: c\ndata: d\n\n"},
		{frame{id: "a\nevent: x", event: "e\nid: y", data: nil}, "data: \n\n"},
		{frame{id: "a\x00b", data: []byte(" x")}, "data:  x\n\n"},
	} {
		if got := string(appendFrame(nil, c.f)); got != c.want {
			t.Errorf("%+v → %q, want %q", c.f, got, c.want)
		}
	}
}

func FuzzFrame(f *testing.F) {
	f.Add("1-1", "opencode", []byte("{}"))
	f.Add("x\n", "\r", []byte("a\r\n\ndata: b\n\n"))
	f.Fuzz(func(t *testing.T, id, event string, data []byte) {
		b := appendFrame(nil, frame{id: id, event: event, data: data})
		b = appendFrame(b, frame{id: "next", event: "end", data: []byte("{}")})
		got := parseFrames(string(b))
		if len(got) != 2 || got[1].id != "next" || got[1].event != "end" {
			t.Fatalf("%q became %+v", b, got)
		}
		want := bytes.ReplaceAll(bytes.ReplaceAll(data, []byte("\r\n"), []byte("\n")), []byte("\r"), []byte("\n"))
		if !bytes.Equal(got[0].data, want) {
			t.Errorf("data %q became %q", data, got[0].data)
		}
		if got[0].id != "" && got[0].id != id {
			t.Errorf("id %q became %q", id, got[0].id)
		}
	})
}
