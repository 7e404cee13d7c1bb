/** The element of an id, which `index.html` has. */
export function element<T extends HTMLElement = HTMLElement>(id: string): T {
  const found = document.getElementById(id);
  if (found === null) throw new Error(`the page has no element ${id}`);
  return found as T;
}

export const input = (id: string) => element<HTMLInputElement>(id);
export const button = (id: string) => element<HTMLButtonElement>(id);

/** The number in a field; null, and the field shows why, where it holds none that it allows. */
export function numberIn(id: string): number | null {
  const field = input(id);
  const details = field.closest("details");
  if (details && !field.checkValidity()) details.open = true;
  return field.reportValidity() && field.value !== "" ? field.valueAsNumber : null;
}

/** Say something where screen readers hear it. `tone` colours it. */
export function say(id: string, text: string, tone: "" | "good" | "bad" = ""): void {
  const place = element(id);
  place.textContent = text;
  place.className = tone;
}

export function megabytes(bytes: number): string {
  return `${(bytes / 1e6).toLocaleString("en", { maximumFractionDigits: bytes < 1e7 ? 1 : 0 })} MB`;
}
