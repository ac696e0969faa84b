package cli

import (
	"encoding/json"
	"strings"

	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

// frame is what of OpenCode's frames is worth a line. Fields that are missing,
// or of another shape in another version, stay empty.
type frame struct {
	Payload struct {
		Type       string          `json:"type"`
		Properties json.RawMessage `json:"properties"`
		Data       json.RawMessage `json:"data"` // of a `sync` event
	} `json:"payload"`
}

type object map[string]json.RawMessage

// at returns a value by path; nil if it is not there.
func (o object) at(keys ...string) json.RawMessage {
	var v json.RawMessage
	for i, k := range keys {
		v = o[k]
		if i == len(keys)-1 {
			break
		}
		o = nil
		if json.Unmarshal(v, &o) != nil {
			return nil
		}
	}
	return v
}

// text returns a string, number or boolean by path; empty if it is none.
func (o object) text(keys ...string) string {
	v := o.at(keys...)
	var s string
	if json.Unmarshal(v, &s) == nil {
		return s
	}
	if len(v) > 0 && v[0] != '{' && v[0] != '[' && string(v) != "null" {
		return string(v)
	}
	return ""
}

// frameText sums an event of OpenCode up: which chat, and what it says.
func frameText(ev *cloudcodev1.OpenCodeEvent) string {
	var f frame
	var p object
	if json.Unmarshal([]byte(ev.GetFrame()), &f) != nil {
		return ev.GetFrame()
	}
	raw := f.Payload.Properties
	if len(raw) == 0 {
		raw = f.Payload.Data
	}
	if json.Unmarshal(raw, &p) != nil {
		return string(raw)
	}

	var out []string
	add := func(s ...string) {
		for _, s := range s {
			if s = strings.TrimSpace(s); s != "" {
				out = append(out, s)
			}
		}
	}
	chat := p.text("sessionID")
	for _, k := range [][]string{{"part", "sessionID"}, {"info", "sessionID"}} {
		if chat == "" {
			chat = p.text(k...)
		}
	}
	switch {
	case p.at("part") != nil: // message.part.updated
		add(p.text("part", "type"), p.text("part", "tool"), p.text("part", "state", "status"), p.text("part", "state", "title"), p.text("part", "text"), p.text("part", "reason"))
	case p.at("status") != nil: // session.status
		add(p.text("status", "type"), p.text("status", "message"), p.text("status"))
	case p.at("info") != nil: // session.*, message.updated
		add(p.text("info", "role"), p.text("info", "modelID"), p.text("info", "title"), p.text("info", "error", "name"))
		if chat == "" {
			chat = p.text("info", "id")
		}
	case p.at("delta") != nil: // message.part.delta
		add(p.text("field"), p.text("delta"))
	case p.at("error") != nil: // session.error
		add(p.text("error", "name"), p.text("error", "data", "message"), p.text("error"))
	default:
		for _, k := range []string{"permission", "title", "file", "event", "command", "version"} {
			add(p.text(k))
		}
	}
	if chat != "" {
		out = append([]string{chat}, out...)
	}
	if len(out) == 0 && len(p) > 0 {
		return string(raw)
	}
	return strings.Join(out, " ")
}
